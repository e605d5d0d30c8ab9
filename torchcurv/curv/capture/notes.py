"""What is noted in the autograd graph of a forward pass, and how it is found again from an output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from torchcurv.curv.capture.calls import Call, Capture, NodeNotes
from torchcurv.curv.graph import Edge, edge_of, metadata


class GraphNotes:
    """Notes at the edges of the graph, in the metadata of its nodes: they live exactly as long as the graph."""

    def __init__(self) -> None:
        self._key = ("torchcurv", id(self))

    def at(self, edge: Edge) -> NodeNotes:
        """What is noted at an edge, to be added to."""
        return metadata(edge.node).setdefault(self._key, {}).setdefault(edge.number, NodeNotes())

    def read(self, edge: Edge) -> NodeNotes:
        """What is noted at an edge."""
        return metadata(edge.node).get(self._key, {}).get(edge.number, NodeNotes())

    def capture_of(
        self, f: Tensor, mixed: bool, several: bool = False, unseen: bool = False
    ) -> tuple[Capture, Edge] | None:
        """The capture of f, or of the model's output that f is computed from, and the edge it is kept at.

        Layers that lie between (or were called outside the model's own forward) make a capture of f itself.
        mixed: whether samples meet in it, where no capture says so.
        several: whether it may join several forward passes. unseen: whether f may depend on parameters whose uses
        leave no note, so that there is a capture where nothing was noted.
        """
        start = self._start(f)
        calls, captures = self._below(start)
        if not calls and (len(captures) == 1 or not (captures or unseen)):
            return captures[0] if captures else None
        forwards = {capture.forward for capture, _ in captures} - {None}
        if len(forwards) > 1 and not several:
            raise ValueError(
                "one loss joins the outputs of several forward passes: give each its own loss call, or call "
                "optimizer.observe(output, target, weight=) for each of them"
            )
        known = {id(call) for call, _ in calls}
        for capture, edge in captures:
            for call, at in capture.calls:
                if id(call) not in known:
                    known.add(id(call))
                    calls.append((call, edge if at is None else at))
        n = captures[0][0].n if captures else (f.shape[0] if f.dim() else 1)
        parts = [capture for capture, _ in captures]
        mixed = mixed if not parts else any(part.mixed for part in parts)
        forward = next(iter(forwards)) if len(forwards) == 1 else None
        joined = Capture(calls, n, f.shape, forward, parts, mixed=mixed)
        self.at(start).capture = joined
        return joined, start

    def _start(self, f: Tensor) -> Edge:
        """The edge of f: its own and not that of its base where the model's output lies between them."""
        base = edge_of(f)
        own = Edge(*get_gradient_edge(f)[:2], f.shape)
        at: Any = own
        while at.node is not None and at.node is not base.node:
            if self.read(at).capture is not None:
                return own
            if len(at.node.next_functions) != 1:
                break
            node, number = at.node.next_functions[0]
            at = Edge(node, number, f.shape)
        return base

    def _below(self, start: Edge) -> tuple[list[tuple[Call, Edge | None]], list[tuple[Capture, Edge]]]:
        """(calls, captures) that are met first on the ways down from an edge; None is the edge itself."""
        calls: list[tuple[Call, Edge | None]] = []
        captures: list[tuple[Capture, Edge]] = []
        seen, queue = set(), [start]
        while queue:
            edge = queue.pop()
            noted = self.read(edge)
            if noted.capture is not None:
                captures.append((noted.capture, edge))
                continue
            calls += [(call, None if edge[:2] == start[:2] else edge) for call in noted.calls]
            for node, number in edge.node.next_functions:
                if node is not None and (node, number) not in seen:
                    seen.add((node, number))
                    queue.append(Edge(node, number, torch.Size()))
        return calls, captures
