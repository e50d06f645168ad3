"""What Megatron refuses late, in other words, or not at all is refused at the start, in one line."""

import pytest
import torch

from megatron_periln.errors import UsageError
from megatron_periln.training.divergence import _OVERFLOW
from megatron_periln.training.flag_names.explain import find_former
from tests.training import flag_trials as trials

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


SAID = {
    "--pipeline-model-parallel-layout Et*xmL": "'Et.xmL': its letters are E .* correct it",
    "--pipeline-model-parallel-layout Ett|L": "2 stages need --pipeline-model-parallel-size above 1",
    "--pipeline-model-parallel-layout EtL": "1 layers t for --num-layers 2; correct it",
    "--pipeline-model-parallel-layout Et|tmL": "1 layers m for --mtp-num-layers 0",
    "--pipeline-model-parallel-layout tE|tL": "must begin with the one E",
    "--num-layers-per-virtual-pipeline-stage 1": "there is one; give --pipeline-model-parallel-size too",
    "--num-virtual-stages-per-pipeline-rank 2": "there is one; give --pipeline-model-parallel-size too",
    "--pretrained-checkpoint nope": "--pretrained-checkpoint nope: there is no checkpoint; give the folder",
    "--load nope --ckpt-step 5": "--load nope: there is no iter_0000005, and no other; give the folder",
    "--tensorboard-dir list.txt/logs": "--tensorboard-dir .*: can't be made in .*list.txt; give a folder",
    "--tensorboard-dir /proc/nope": "--tensorboard-dir /proc/nope: can't be made in /proc; give a folder",
    "--dump-param-to-param-group-map list.txt/map": "--dump-param-to-param-group-map .*: can't be made in",
    "--result-rejected-tracker-filename no/such": "--result-rejected-tracker-filename .*: can't be made in",
    "--encoder-num-layers 2": "--encoder-num-layers is another name of --num-layers: this trains GPT-style",
    "--encoder-seq-length 16": "--encoder-seq-length is another name of --seq-length: this trains GPT-style",
    "--decoder-seq-length 16": "this trains GPT-style models; drop them",
    "--img-h 3 --tokenizer-type BertWordPieceCase": "--img-h: of other models, and this trains GPT-style",
    "--phase-transition-iterations 1": "counts samples: give --train-samples",
    "--lazy-mpu-init": "--lazy-mpu-init: .* drop it",
    "--no-initialization": "--no-initialization leaves weights as the memory was",
    "--save-wgrads-interval 2": "--save-wgrads-interval needs --save",
    "--save-activations-interval 2 --save s --save-interval 9": "needs Transformer Engine",
}


@pytest.mark.parametrize(("flags", "said"), SAID.items())
def test_it_is_said_in_one_line_before_anything_is_written(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").touch()
    with pytest.raises(UsageError, match=said):
        trials.parse(f"{trials.MODELS['dense']} {flags}")
    assert [path.name for path in tmp_path.rglob("*")] == ["list.txt"]


def test_layouts_that_fit_are_taken():
    for layout in ("EttL", "E,tt,L", "E(t)*2L"):
        args, _ = trials.parse(f"{trials.MODELS['dense']} --pipeline-model-parallel-layout {layout} --seed 8")
        assert args.num_layers == 2


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("--yarn-mscale", ("--mscale", "2")),
        ("--beta-fast", ("--yarn-beta-fast", "2")),
        ("--beta-slow", ("--yarn-beta-slow", "2")),
        ("--attn-chunk-size", None),
    ],
)
def test_what_newer_recipes_give_has_a_name_here_or_a_reason(given, instead):
    assert find_former([given, "2"]).instead == instead


def test_torch_s_words_for_a_step_beyond_fp32_are_known():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], lr=1e38)
    weight.grad = torch.ones(2)
    with pytest.raises((RuntimeError, OverflowError)) as caught:
        optimizer.step()
    assert _OVERFLOW.search(str(caught.value))
