"""Mistakes that a comparison with one process must notice; each is made by every rank of a job."""

from megatron_periln.models import finish, gpt
from megatron_periln.norms import embedding, kernels, modules


def untag_output_norms():
    """Leave the output norms' gradients unsummed under sequence parallelism."""
    build = modules.OutputNorm.__init__

    def untagged(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.sequence_parallel = False

    modules.OutputNorm.__init__ = untagged


def untag_embedding_norm():
    """Leave the embedding norm's gradient unsummed under sequence parallelism."""
    build = embedding.EmbeddingNorm.__init__

    def untagged(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    embedding.EmbeddingNorm.__init__ = untagged


def norm_before_the_bias():
    """Add the linear bias after the output norm."""
    norm_add = kernels.norm_add

    def before(sublayer_output, sublayer_bias, residual, *args):
        out = norm_add(sublayer_output, None, residual, *args)
        return out if sublayer_bias is None else out + sublayer_bias

    kernels.norm_add = before


def embedding_norm_on_the_second_stage():
    """Norm what the second pipeline stage receives, not the embedding."""
    build = gpt.GPTModelBuilder.build_model

    def misplaced(self, *args, **kwargs):
        model = build(self, *args, **kwargs)
        if model.pre_process:
            model.embedding.norm.bypassed = True
        else:
            receive, second = model.set_input_tensor, modules.Norm(model.config)

            def normed(tensors):
                tensors = tensors if isinstance(tensors, list) else [tensors]
                receive([tensor if tensor is None else second(tensor) for tensor in tensors])

            model.set_input_tensor = normed
            object.__setattr__(model, "_misplaced_norm", second)
        return model

    gpt.GPTModelBuilder.build_model = misplaced


def skip_the_embedding_norms_gradient():
    """Drop the embedding norm's gradient, as if only the tied word embedding were reduced."""
    attach = embedding.EmbeddingNorm.attach

    def skipped(self, model):
        attach(self, model)
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient: gradient * 0)

    embedding.EmbeddingNorm.attach = skipped


def leave_latent_attention_as_it_is():
    """Undo `megatron_periln.patches.tensor_parallel_gradients`."""
    finish.fix_latent_attention = lambda model: None


def leave_delta_nets_as_they_are():
    """Undo `megatron_periln.patches.tensor_parallel_gradients` for the other kind of layer."""
    finish.fix_delta_nets = lambda model: None
