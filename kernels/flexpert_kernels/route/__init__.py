"""The router's probabilities and choices, and the order of rows by expert."""

from typing import NamedTuple

from torch import Tensor

#: That the kernels take.
MAX_EXPERTS = 256


class Order(NamedTuple):
    """Rows in the order of their experts, as `sort_by_expert` finds it."""

    order_N: Tensor
    places_TK: Tensor
    offsets: Tensor
