"""Megatron takes its flags' help from its sources, for each parser anew: 0.08 s, and a rank makes three."""


def read_once():
    """Let it read each of its classes once in this process, which imports Megatron's training for it."""
    from megatron.training import argument_utils  # seconds, which whoever imports Megatron anyway has spent

    factory = argument_utils.ArgumentGroupFactory
    factory._get_field_docstrings = _once_a_class(factory._get_field_docstrings)


def _once_a_class(read):
    texts = {}

    def remembered(self, settings):
        if settings not in texts:
            texts[settings] = read(self, settings)
        return texts[settings]

    return remembered
