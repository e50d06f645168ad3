"""Rules for packages that flags need and that are not installed: Megatron asks for them late, on some ranks.

The versions are those that megatron-core 0.19.2 names in its own extras. What pip finds has an extra of ours.
"""

from __future__ import annotations

import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import get_async_strategy

from megatron_periln import cpu
from megatron_periln.rules import Check, Rule

__all__ = ["PACKAGES", "installed", "save_asynchronously_without_nvrx"]


def installed(*modules: str) -> bool:
    """Tell whether one of these modules can be imported, without importing it."""
    return any(_found(module) for module in modules)


def _found(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class _Package:
    """What one or several flags need.

    Attributes
    ----------
    asked
        Whether they are given.
    flags
        How they are called.
    name, modules
        The package, and modules of it of which one will do.
    install
        How to get it.
    otherwise
        What to do without it.
    instead
        As in `Rule`.
    """

    asked: Callable[[Namespace], Any]
    flags: str
    name: str
    modules: tuple[str, ...]
    install: str
    otherwise: str
    instead: Mapping[str, object] = field(default_factory=dict)

    def __call__(self, args: Namespace) -> Iterator[str]:
        """Yield what to do if the package is asked for, and missing."""
        if self.asked(args) and not installed(*self.modules):
            flags = self.flags.format_map(vars(args))
            yield (
                f"{flags} needs the package {self.name}, which is not installed; {self.install}, "
                f"or {self.otherwise}"
            )
            vars(args).update(self.instead)


def _pip(requirement: str) -> str:
    return f"pip install '{requirement}'"


def _extra(name: str) -> str:
    return _pip(f"megatron-periln[{name}]")


def _on_a_gpu(asked: Callable[[Namespace], Any]) -> Callable[[Namespace], Any]:
    """Ask for what only a GPU can run where there is one; what the CPU lacks is said by other rules."""
    return lambda args: not cpu.is_active() and asked(args)


def _flex(backend: str) -> Callable[[Namespace], Any]:
    return lambda args: (
        args.moe_token_dispatcher_type == "flex" and args.moe_flex_dispatcher_backend == backend
    )


def _in_storage(scheme: str) -> Callable[[Namespace], bool]:
    def asked(args: Namespace) -> bool:
        lists = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
        return any(path.startswith(scheme) for paths in lists for path in paths or ())

    return asked


_NVRX = "nvidia-resiliency-ext"
_ALLTOALL = "give --moe-token-dispatcher-type alltoall, which computes the same"
_WITHOUT_FLEX = {"moe_token_dispatcher_type": "alltoall", "moe_enable_deepep": False}

PACKAGES: tuple[Check, ...] = (
    _Package(
        lambda args: args.wandb_project,
        "--wandb-project",
        "wandb",
        ("wandb",),
        _extra("wandb"),
        "drop the --wandb flags",
        {"wandb_project": ""},
    ),
    # Only the last rank would find these out, while the others wait for it.
    Rule(
        lambda args: args.wandb_project and not args.wandb_exp_name,
        "--wandb-project needs --wandb-exp-name, the name of the run; give it too",
    ),
    Rule(
        lambda args: args.wandb_project and not (args.wandb_save_dir or args.save),
        "--wandb-project needs a folder; give --wandb-save-dir, or --save",
    ),
    _Package(
        lambda args: args.optimizer not in ("adam", "sgd"),
        "--optimizer {optimizer}",
        "emerging-optimizers",
        ("emerging_optimizers",),
        _extra("muon"),
        "choose adam or sgd",
        {"optimizer": "adam"},
    ),
    _Package(
        lambda args: args.non_persistent_ckpt_type == "local",
        "--non-persistent-ckpt-type local",
        _NVRX,
        ("nvidia_resiliency_ext",),
        _extra("resiliency"),
        "give --non-persistent-ckpt-type global",
        {"non_persistent_ckpt_type": "global"},
    ),
    _Package(
        lambda args: args.enable_ft_package,
        "--enable-ft-package",
        _NVRX,
        ("nvidia_resiliency_ext",),
        _extra("resiliency"),
        "drop it",
        {"enable_ft_package": False},
    ),
    _Package(
        lambda args: args.fault_injector_ranks or args.fault_injector_num_ranks,
        "--fault-injector-ranks, --fault-injector-num-ranks",
        _NVRX,
        ("nvidia_resiliency_ext",),
        _extra("resiliency"),
        "drop them",
        {"fault_injector_ranks": None, "fault_injector_num_ranks": None},
    ),
    _Package(
        lambda args: args.hierarchical_context_parallel_sizes,
        "--hierarchical-context-parallel-sizes",
        "einops",
        ("einops",),
        _extra("einops"),
        "drop it, and give --cp-comm-type p2p or a2a",
        {"hierarchical_context_parallel_sizes": None, "cp_comm_type": ["p2p"]},
    ),
    _Package(
        _on_a_gpu(lambda args: args.use_megatron_fsdp),
        "--use-megatron-fsdp",
        "einops",
        ("einops",),
        _extra("einops"),
        "give --use-distributed-optimizer",
    ),
    _Package(
        lambda args: "M" in (args.hybrid_layer_pattern or args.hybrid_override_pattern or ""),
        "--hybrid-layer-pattern with Mamba layers",
        "einops",
        ("einops",),
        _extra("einops"),
        "choose a pattern without M",
    ),
    _Package(
        _on_a_gpu(lambda args: "M" in (args.hybrid_layer_pattern or args.hybrid_override_pattern or "")),
        "--hybrid-layer-pattern with Mamba layers",
        "mamba-ssm",
        ("mamba_ssm",),
        f"{_extra('mamba')} --no-build-isolation",
        "choose a pattern without M",
    ),
    _Package(
        _on_a_gpu(
            lambda args: (
                args.experimental_attention_variant == "gated_delta_net"
                or "G" in (args.hybrid_layer_pattern or args.hybrid_override_pattern or "")
            )
        ),
        "A gated delta net (--experimental-attention-variant, or G in --hybrid-layer-pattern)",
        "flash-linear-attention",
        ("fla",),
        _extra("deltanet"),
        "choose other attention, which is another model",
    ),
    _Package(
        _on_a_gpu(lambda args: args.experimental_attention_variant == "dsa"),
        "--experimental-attention-variant dsa",
        "fast-hadamard-transform",
        ("fast_hadamard_transform",),
        f"{_extra('dsa')} --no-build-isolation",
        "choose other attention, which is another model",
    ),
    _Package(
        _flex("deepep"),
        "--moe-flex-dispatcher-backend deepep",
        "DeepEP",
        ("deep_ep",),
        "install it from the repository deepseek-ai/DeepEP (deep-ep on PyPI is another package)",
        _ALLTOALL,
        _WITHOUT_FLEX,
    ),
    _Package(
        _flex("hybridep"),
        "--moe-flex-dispatcher-backend hybridep",
        "DeepEP with HybridEP",
        ("deep_ep",),
        "install it from the branch hybrid-ep of the repository deepseek-ai/DeepEP",
        _ALLTOALL,
        _WITHOUT_FLEX,
    ),
    _Package(
        _on_a_gpu(lambda args: args.attention_backend.name == "flash"),
        "--attention-backend flash",
        "flash-attn",
        ("flash_attn", "flash_attn_3", "flash_attn_interface"),
        f"{_pip('flash-attn')} --no-build-isolation",
        "drop it: Transformer Engine chooses a kernel",
    ),
    _Package(
        lambda args: args.enable_msc,
        "--enable-msc",
        "multi-storage-client",
        ("multistorageclient",),
        _pip("multi-storage-client~=0.50"),
        "drop it",
        {"enable_msc": False},
    ),
    _Package(
        _in_storage("s3://"),
        "data in s3://",
        "boto3",
        ("boto3",),
        _pip("boto3"),
        "give paths of this machine",
    ),
)
"""What is asked for and not installed, once a checkpoint's arguments are adopted, and adapted to the CPU."""


def save_asynchronously_without_nvrx(args: Namespace) -> list[str]:
    """Choose the writer of asynchronous saves that is part of Megatron where the other is not installed.

    Parameters
    ----------
    args
        Megatron's, parsed; ``async_strategy`` is changed in place.

    Returns
    -------
    list of str
        One line that says so, if it was changed.
    """
    # Without the worker Megatron turns asynchronous saves off.
    saves = args.async_save and args.use_persistent_ckpt_worker
    if not saves or args.async_strategy != "nvrx":
        return []
    try:
        get_async_strategy("nvrx")
    except ImportError:
        args.async_strategy = "mcore"
        return [
            "--async-strategy: mcore, which is part of Megatron, for nvidia-resiliency-ext is not installed, "
            f"or not in a version that fits ({_extra('resiliency')})"
        ]
    return []
