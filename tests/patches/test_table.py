"""Everything that is changed in Megatron and torch is in one place, and in the documentation's table."""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path

import pytest

from megatron_periln.patches import fixes
from tests.patches import architecture_page
from tests.patches.upstream_changes import changes

PACKAGE = architecture_page.ROOT / "megatron_periln"
PATCHES = architecture_page.all_patches()
KNOWN = frozenset(symbol.rpartition(".")[2] for patch in PATCHES for symbol in patch.symbols)
# Attributes whose names are common: of objects that have nothing to do with Megatron or torch.
COMMON = {"open", "pickle", "fork", "to", "type", "cuda", "load", "empty", "compile", "accelerator"}
# A tokenizer library is imported without another one that it does not need: no change to Megatron or torch.
# What they change is a stand-in for awkward, and copies of configurations and datasets of our own class; and
# configurations for as long as it takes to find all that they refuse of a copy of the arguments. And a plan
# is of a job that is not there: what it changes is as before once a rank is built (tests/plan/test_ranks.py).
OTHER = {
    *(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.glob("plan/model/*.py")),
    "data/tokenizers/encoders/gigatoken.py",
    "training/datasets/index_cache.py",
    "training/refusals/trial.py",
}
NO_PATCHES = {
    "add_product",
    "apply",
    "changes",
    "install",
    "is_active",
    "activate",
    "on_cpu",
    "surface",
    "why_unreadable",
    "adapt_arguments",
    "fork_ranks",  # what launch.py hands to what changes torch
    "low_precision",
    "without_low_precision",
    # of megatron_periln/cpu/state_spaces.py, handed to what changes them
    "causal_conv1d",
    "chunk_scan",
    "gated_delta_rule",
    "l2norm",
    "scan",
    "split_conv1d_scan",
}


def by_name(patch):
    return patch.function.__name__


def test_the_documentation_has_the_table():
    here, _, _ = architecture_page.written()
    assert here == architecture_page.section(), "run python -m tests.patches.architecture_page"


@pytest.mark.parametrize("patch", PATCHES, ids=by_name)
def test_it_says_why_and_until_when(patch):
    assert patch.symbols
    assert patch.why
    assert bool(patch.until) != bool(patch.stays)


@pytest.mark.parametrize("symbol", sorted({symbol for patch in PATCHES for symbol in patch.symbols}))
def test_what_is_changed_exists(symbol):
    """An attribute that only objects have is named in the source of their class or module."""
    names = symbol.split(".")
    if importlib.util.find_spec(names[0]) is None:
        pytest.skip(f"{names[0]} is not installed")
    for length in range(len(names), 0, -1):
        try:
            found = importlib.import_module(".".join(names[:length]))
        except ImportError:
            continue
        break
    for name in names[length:-1]:
        found = getattr(found, name)
    last = names[-1]
    if length < len(names) and not hasattr(found, last) and last != "open":
        assert last in inspect.getsource(found), symbol


@pytest.mark.parametrize("test", sorted({test for patch in PATCHES for test in patch.until}))
def test_the_test_exists(test):
    path, _, name = test.partition("::")
    functions = ast.parse((architecture_page.ROOT / path).read_text()).body
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}
    assert "upstream_still" in name


def test_every_public_function_is_described():
    described = {inspect.unwrap(patch.function) for patch in PATCHES}
    public = {
        inspect.unwrap(value)
        for module in architecture_page.modules()
        for name in getattr(module, "__all__", ())
        if inspect.isfunction(value := getattr(module, name)) and name not in NO_PATCHES
    }
    assert public <= described
    assert {function.__name__ for function in described - public} == {"install"}


def test_every_fix_is_applied():
    of_fixes = {"fixes", "optimizer_state", "checkpoint_loading", "tokenizer_files"}
    described = {patch.function for patch in PATCHES if Path(patch.file).stem in of_fixes}
    assert set(fixes.FIXES) == described


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("patches/*.py")), ids=lambda path: path.stem)
def test_a_patch_changes_what_it_says(path):
    declared = {
        inspect.unwrap(patch.function).__name__: {symbol.rpartition(".")[2] for symbol in patch.symbols}
        for patch in PATCHES
        if patch.file == f"patches/{path.name}"
    }
    for change in changes(path.read_text(), KNOWN - COMMON):
        if (path.stem, change.function) == ("checkpoint_writer", "_write"):  # called by what open_with makes
            change = change._replace(function="open_with")
        assert change.attribute in {*declared[change.function], ""}, change


def test_nothing_else_in_the_package_changes_megatron_or_torch():
    found = {
        f"{name}:{change.line} {change.attribute}"
        for path in PACKAGE.rglob("*.py")
        if (name := path.relative_to(PACKAGE).as_posix()).split("/")[0] not in ("patches", "cpu")
        and name not in OTHER
        for change in changes(path.read_text(), KNOWN - COMMON)
    }
    assert found == set()


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.compile = None",
        "import torch.utils.data\ntorch.utils.data.DataLoader.__init__ = None",
        "import megatron.core.utils as utils\nutils.f = utils.g = None",
        "from megatron.core import utils\nutils.f, x = None, 1",
        "from megatron.core import utils\nmodule: object = utils\nmodule.f = None",
        "from megatron.core import utils\nlayer = utils.Layer\nsame = layer\nsame.forward = None",
        "def f():\n    from megatron.core import utils\n    utils.f = None",
        "from torch import nn\nfor each in (nn.Linear, nn.Module):\n    each.to = None",
        "from torch import nn\nsetattr(nn.Module, name, None)",
        "from torch import nn\nfunctools.partial(setattr, nn.Module, 'to')",
        "from torch import nn\nvars(nn.Module)['to'] = None",
        "from torch import nn\nnn.__dict__['Linear'] = None",
        "from torch import nn\ndel nn.Linear",
        "from torch import nn\nwith mock.patch.object(nn, 'Linear'):\n    pass",
        "import torch\nmonkeypatch.setattr(torch, 'compile', None)",
        "from megatron.core import Layer\ndef f(layer: Layer | None):\n    layer.forward = None",
        "module = importlib.import_module(name)\nmodule.f = None",
        "module = sys.modules[name]\nmodule.f = None",
        "sys.modules['megatron.core.utils'] = None",
        "for layer in model.layers:\n    layer.mlp_bda = None",
        "setattr(layer, 'mlp_bda', None)",
        "setattr(layer, name, None)",
    ],
)
def test_a_change_is_found(code):
    assert changes(code, KNOWN - COMMON)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\nclass A(torch.nn.Module):\n    def f(self):\n        self.weight = 1",
        "import torch\ncompiled = torch.compile",
        "import torch\nx = torch.ones(2)\nx[0] = 1",
        "args.iteration = 3",
        "setattr(args, name, 3)",
    ],
)
def test_other_assignments_are_none(code):
    assert not changes(code, KNOWN - COMMON)
