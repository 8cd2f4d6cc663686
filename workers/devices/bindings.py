"""A table of bindings: what a device does for a node, by its op, or for neighbours that it has one kernel for."""

from __future__ import annotations

from collections.abc import Callable

Binding = Callable[..., bool]
"""A function of a binder and of nodes: it adds what is to be done, and returns whether there is anything it could add."""


class Bindings(dict[tuple[str, ...], Binding]):
    """By the op, or by the ops of neighbours that are one step."""

    def of(self, *ops: str) -> Callable[[Binding], Binding]:
        """Declares the binding of each of these ops."""

        def add(f: Binding) -> Binding:
            self.update({(op,): f for op in ops})
            return f

        return add

    def of_neighbours(self, *ops: str) -> Callable[[Binding], Binding]:
        """Declares the binding of neighbours with these ops."""

        def add(f: Binding) -> Binding:
            self[ops] = f
            return f

        return add
