"""The LoRA term of a product: which factors it has, and how kernels go through its modules.

S, dX and dA     A of all modules. Without dropout they count as one (`wide`): their rows of A and columns of S are adjacent.
Y                B of each module, in the module's own columns
dS, dB           B of one module
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fused_ops.lora.adapters import LoraGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraTerm:
    """`factors` by module (A: one for all), how many modules kernels go through, the first one, and the largest rank (0: no term)."""

    factors: tuple[Tensor, ...] = ()
    num_modules: int = 1
    first_module: int = 0
    width: int = 0
    dropout: bool = False
    wide: bool = False

    @property
    def with_rows(self) -> list[Tensor]:
        """Return the factors, the longest in place of a module that no adapter targets: a descriptor needs rows."""
        return [each if len(each) else max(self.factors, key=len) for each in self.factors]


def term_of_a(group: LoraGroup) -> LoraTerm:
    """Return the term of S, dX and dA."""
    dropout = group.has_dropout
    num_modules, width = (group.num_modules, group.max_padded_rank) if dropout else (1, group.width)
    return LoraTerm(factors=(group.a_RK,), num_modules=num_modules, width=width, dropout=dropout, wide=not dropout)


def term_of_b(group: LoraGroup) -> LoraTerm:
    """Return the term of Y."""
    return LoraTerm(factors=group.b_RN, num_modules=group.num_modules, width=group.max_padded_rank)


def term_of_module(group: LoraGroup, module: int) -> LoraTerm:
    """Return the term of one module's dS and dB."""
    return LoraTerm(factors=(group.b_RN[module],), first_module=module, width=group.max_padded_rank)


def three(values: Iterable) -> list[Any]:
    """Return values, and None for modules that there are not: descriptors cannot be passed to a kernel in a tuple."""
    return [*values, None, None, None][:3]
