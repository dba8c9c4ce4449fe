"""A value per neuron, or per weight, of the whole model, a layer at a time.

Formulas are written on these, so that `z(fo) + z(ce)` never needs more than one layer of it in memory.
"""

from collections.abc import Callable, Sequence

from torch import Tensor


class ModelVector(Sequence):
    """A value per neuron `[d_ff]` (or per weight `[projections, d_ff, d]`) of every layer, computed when asked for."""

    def __init__(self, n_layers: int, layer: Callable[[int], Tensor]):
        self._n_layers, self._layer = n_layers, layer

    def __len__(self) -> int:
        return self._n_layers

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._n_layers:
            raise IndexError(index)
        return self._layer(index)

    def __add__(self, other: "ModelVector") -> "ModelVector":
        return ModelVector(len(self), lambda index: self[index] + other[index])

    def __pow__(self, exponent: float) -> "ModelVector":
        return ModelVector(len(self), lambda index: self[index] ** exponent)


def each(formula: Callable[..., Tensor], *vectors: ModelVector) -> ModelVector:
    """`formula` of one layer's tensors, for every layer."""
    return ModelVector(len(vectors[0]), lambda index: formula(*(vector[index] for vector in vectors)))


def z(vector: ModelVector) -> ModelVector:
    """`(x - mean) / std` over the whole model; 0 where all values are equal."""
    count = sum(x.numel() for x in vector)
    mean = sum(x.double().sum() for x in vector) / count
    variance = sum((x.double() - mean).square().sum() for x in vector) / max(count - 1, 1)
    mean, inverse = float(mean), float(variance) ** -0.5 if variance > 0 else 0.0
    return ModelVector(len(vector), lambda index: (vector[index] - mean) * inverse)
