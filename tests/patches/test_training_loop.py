"""What an observer sees of Megatron's training loop, and that there is no other way to see it."""

import inspect
from argparse import Namespace

import pytest
from megatron.training import training
from megatron.training.datasets import data_samplers

from megatron_periln.patches import training_loop
from tests.cpu.unpatched import copy_of

NAMES = ("train_step", "training_log", "save_checkpoint_and_time")


class Observer:
    """Remembers what it sees, and gives an iteration another schedule."""

    def __init__(self):
        self.seen = []

    def begin(self, iteration, forward_backward, model, optimizer):
        self.seen.append(("begin", iteration, forward_backward, model, optimizer))
        return "watched schedule"

    def end(self, iteration, losses, grad_norm, learning_rate):
        self.seen.append(("end", iteration, losses, grad_norm, learning_rate))

    def before_save(self):
        self.seen.append(("before save",))


@pytest.fixture
def called(monkeypatch):
    """What reaches the functions of Megatron, which only remember it here."""
    called = {}
    for name in NAMES:
        monkeypatch.setattr(
            training, name, lambda *args, name=name, **kwargs: called.update({name: (args, kwargs)})
        )
    return called


def test_an_observer_sees_every_iteration_and_changes_the_schedule_alone(called):
    observer = Observer()
    training_loop.observe(observer)
    step = ("forward", "data", ["model"], "optimizer", "scheduler", "config")
    training.train_step(*step, "schedule", 3, pg_collection="groups")
    log = ({"lm loss": 2.0}, {}, 0.1, 4, 1.0, True, 0, 5.0)
    training.training_log(*log, "params norm", is_first_iteration=True)
    training.save_checkpoint_and_time(4, non_persistent_ckpt=True)
    assert observer.seen == [
        ("begin", 4, "schedule", ["model"], "optimizer"),
        ("end", 4, {"lm loss": 2.0}, 5.0, 0.1),
        ("before save",),
    ]
    assert called == {
        "train_step": ((*step, "watched schedule"), {"iteration": 3, "pg_collection": "groups"}),
        "training_log": ((*log, "params norm"), {"is_first_iteration": True}),
        "save_checkpoint_and_time": ((4,), {"non_persistent_ckpt": True}),
    }


def test_upstream_still_has_no_callback_for_an_iteration():
    """One would be a new argument of ``pretrain``."""
    assert list(inspect.signature(training.pretrain).parameters) == [
        "cfg_container",
        "train_valid_test_dataset_provider",
        "model_type",
        "forward_step_func",
        "model_provider",
        "process_non_loss_data_func",
        "get_embedding_ranks",
        "get_position_embedding_ranks",
        "non_loss_data_func",
        "store",
        "inprocess_call_wrapper",
        "p2p_communicator",
        "pg_collection",
        "skip_model_parallel_init",
    ]


def test_upstream_still_calls_what_is_observed_by_name_and_with_these_arguments():
    source = inspect.getsource(training)
    assert all(f"{name}(" in source for name in NAMES)
    step, log = (
        list(inspect.signature(function).parameters)
        for function in (training.train_step, training.training_log)
    )
    assert step[2:4] == ["model", "optimizer"]
    assert step[6:8] == ["forward_backward_func", "iteration"]
    assert [log[i] for i in (0, 2, 3, 7)] == ["loss_dict", "learning_rate", "iteration", "grad_norm"]


@pytest.fixture
def loaders(monkeypatch):
    """Build the loaders of data of which there is nothing for validation; return what is to be evaluated."""
    monkeypatch.setattr(
        training, "build_train_valid_test_data_loaders", training.build_train_valid_test_data_loaders
    )

    def build():
        args = Namespace(
            iteration=0, consumed_train_samples=0, consumed_valid_samples=0, phase_transition_iterations=None,
            train_samples=None, train_iters=2, global_batch_size=2, eval_iters=1, eval_interval=1,
            start_eval_at_iter=None, full_validation=False, skip_train=False, multiple_validation_sets=False,
            perform_rl_step=False,
        )  # fmt: skip
        monkeypatch.setattr(training, "get_args", lambda: args)
        monkeypatch.setattr(training, "build_pretraining_data_loader", lambda data, _: data)

        def provide(_):
            return "train", None, "test"

        provide.is_distributed = True
        assert training.build_train_valid_test_data_loaders(provide) == ("train", [None], "test")
        return bool(args.do_train), bool(args.do_valid), bool(args.do_test)

    return build


def test_upstream_still_evaluates_without_a_dataset(single_process, loaders):
    assert loaders() == (True, True, True)


def test_what_has_no_dataset_is_not_evaluated(single_process, loaders):
    training_loop.skip_validation()
    assert loaders() == (True, False, True)


def test_upstream_still_loses_the_number_of_batches_of_a_test():
    """Once this fails, see which part of the change can go: tests/parallel/test_evaluation.py needs it."""
    upstream = copy_of(training.__name__)
    builds = inspect.getsource(upstream.build_train_valid_test_data_iterators)
    assert "args.eval_iters = eval_iters_tensor.tolist()" in builds
    assert "local_eval_iters = len(valid_dataloaders[0])" in builds
    evaluates = inspect.getsource(upstream.evaluate_and_print_results)
    assert "eval_iters = torch.tensor(args.eval_iters, dtype=torch.long, device='cuda')" in evaluates
    assert "args.eval_iters = eval_iters[0] if not args.multiple_validation_sets" in evaluates
    assert "data_iterators = data_iterator if args.multiple_validation_sets" in evaluates


def rounds(sampler, samples, ranks):
    """Return what the ranks read at once, in two evaluations, and how many batches each has in one."""
    ranks = [sampler(samples, rank, ranks) for rank in range(ranks)]
    cycles = [training.cyclic_iter(rank) for rank in ranks]
    count = max(map(len, ranks))
    evaluations = [[[next(cycle)[0] for cycle in cycles] for _ in range(count)] for _ in range(2)]
    return evaluations, [len(rank) for rank in ranks]


def test_upstream_still_gives_some_ranks_fewer_samples():
    sampler = copy_of(data_samplers.__name__).MegatronFullValidationSampler
    assert rounds(sampler, 5, 2) == ([[[0, 1], [2, 3], [4, 1]], [[0, 3], [2, 1], [4, 3]]], [3, 2])


@pytest.mark.parametrize("samples, ranks", [(5, 2), (6, 2), (2, 3), (7, 1)])
def test_each_sample_is_validated_once(monkeypatch, samples, ranks):
    sampler = data_samplers.MegatronFullValidationSampler
    for name in ("__len__", "__iter__"):
        monkeypatch.setattr(sampler, name, getattr(sampler, name))
    training_loop.validate_on_each_sample_once()
    evaluations, lengths = rounds(sampler, samples, ranks)
    assert lengths == [-(-samples // ranks)] * ranks
    for batches in evaluations:
        read = [number for batch in batches for number in batch]
        assert read[:samples] == list(range(samples)) and set(read[samples:]) <= {None}


def test_there_is_no_test_of_no_batches(monkeypatch):
    """Megatron printed the loss of nothing."""
    args = Namespace(full_validation=True, multiple_validation_sets=False, eval_iters=0)
    monkeypatch.setattr(training, "get_args", lambda: args)

    def build(provider):
        args.do_test = True
        return "train", [None], "test"

    upstream = training_loop._FullValidation(build, lambda provider: None, None)
    upstream.build_iterators("provider")
    assert upstream.build_loaders("provider") == ("train", None, "test")
    assert args.do_test is False


@pytest.mark.parametrize("last", [False, True])
def test_the_step_that_ends_a_run_may_be_left_unsaved(monkeypatch, last):
    result = ({}, True, True, last, 16 if last else 0, None, None, 0)
    monkeypatch.setattr(training, "train_step", lambda *args, **kwargs: result)
    seen = []

    def decide(*given):
        seen.append(given)
        return False, 17

    training_loop.before_exit(decide)
    step = training.train_step("forward", "data", ["model"], "optimizer", iteration=4, pg_collection="groups")
    assert step == (({}, True, False, True, 17, None, None, 0) if last else result)
    assert seen == ([(5, ["model"], True, 16)] if last else [])


def test_upstream_still_saves_at_a_nan_wherever_it_may_be():
    """Once the loop asks for ``--save`` here, and whether the weights are finite, the change may go."""
    train = inspect.getsource(training.train)
    assert "        if should_checkpoint:\n            save_checkpoint_and_time(" in train
    step = inspect.getsource(training.train_step)
    assert "if should_exit:\n        return {}, True, should_checkpoint, should_exit, exit_code," in step
