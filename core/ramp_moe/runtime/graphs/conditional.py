"""Adds several bodies to a CUDA graph in capture, of which the device chooses one at every replay.

    nodes   Every body has a branch of its own. The kernel that chooses switches its kernel nodes on or off (device-
            updatable nodes, CUDA 12.4). Bodies launch kernels alone, and the graph can be instantiated only once.
    switch  A conditional node has a graph for each body (CUDA 12.8). Bodies are whatever can be captured.

Both are added to the capture in progress on the current stream. So they also work inside an engine's own capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import KernelError
from . import nvrtc
from .nvrtc import checked

if TYPE_CHECKING:
    import torch

    from .selector_cuda import Launch

Body = Callable[[], None]
Select = Callable[[int], "Launch"]
"""Launches the choice on the current stream. Takes the handle of the conditional node to set; 0: there is none."""
NODES_SINCE, SWITCH_SINCE = 12040, 12080
"""CUDA versions from which on the modes exist, as the driver counts them."""
MAX_NODES = 128
"""Most kernel nodes of all bodies together; NODES of select.cu."""


@functools.cache
def unsupported(mode: str) -> str | None:
    """Why a mode is impossible on this machine; None if it is possible."""
    import torch

    if torch.version.cuda is None:
        return "needs CUDA"
    if reason := nvrtc.unavailable():
        return reason
    from cuda.bindings import driver

    since = NODES_SINCE if mode == "nodes" else SWITCH_SINCE
    for what, found in (("the driver", checked(driver.cuDriverGetVersion(), "asking for the driver's version")),
                        ("torch", _version(torch.version.cuda))):  # fmt: skip
        if found < since:
            return f"needs CUDA {since // 1000}.{since % 1000 // 10}; {what} has {found // 1000}.{found % 1000 // 10}"
    return None


def _version(text: str) -> int:
    major, minor = text.split(".")[:2]
    return int(major) * 1000 + int(minor) * 10


def kernel_nodes(body: Body, side: torch.cuda.Stream) -> int | None:
    """The number of kernels that a body launches; None if it launches anything else, too.

    The body is captured on `side` to find out. Run it before: what it loads or compiles cannot be captured.
    """
    from cuda.bindings import runtime

    graph = _captured(body, side, None)
    try:
        count = checked(runtime.cudaGraphGetNodes(graph, 0), "reading a captured body")[1]
        found = checked(runtime.cudaGraphGetNodes(graph, count), "reading a captured body")[0]
        kinds = {checked(runtime.cudaGraphNodeGetType(node), "reading a captured body") for node in found}
        return len(found) if kinds <= {runtime.cudaGraphNodeType.cudaGraphNodeTypeKernel} else None
    finally:
        runtime.cudaGraphDestroy(graph)


def _captured(body: Body, side: torch.cuda.Stream, into: Any) -> Any:
    """Capture a body on `side`: into the graph `into`, or if None into a new one. Returns the graph."""
    import torch
    from cuda.bindings import runtime

    relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    if into is None:
        started = runtime.cudaStreamBeginCapture(side.cuda_stream, relaxed)
    else:
        started = runtime.cudaStreamBeginCaptureToGraph(side.cuda_stream, into, None, None, 0, relaxed)
    checked(started, "capturing a body")
    try:
        with torch.cuda.stream(side):
            body()
    finally:
        ended = runtime.cudaStreamEndCapture(side.cuda_stream)
    return checked(ended, "capturing a body")


def capture_nodes(select: Select, function: Any, bodies: Sequence[Body]) -> int:
    """Add the choice and the bodies to the capture on the current stream, in mode "nodes".

    Each body must launch kernels alone. `select` must launch with `last`, which the nodes need. Returns the number of
    kernel nodes. Raises KernelError for more than MAX_NODES.
    """
    from cuda.bindings import driver

    launch = select(0)
    (choice,) = _capture()[1]
    owned: list[tuple[int, int]] = []
    ends: list[Any] = []
    for index, body in enumerate(bodies):
        _continue_from([choice])
        body()
        last = _capture()[1]
        owned += [(index, _device_updatable(node)) for node in _between(last, choice)]
        ends += last
    _continue_from(ends)
    if len(owned) > MAX_NODES:
        raise KernelError(f"the bodies have {len(owned)} kernels, more than {MAX_NODES}: give fewer candidates")
    for i, (index, handle) in enumerate(owned):
        launch.params.nodes[i], launch.params.body_of[i] = handle, index
    launch.params.num_nodes = len(owned)
    node = driver.CUgraphNode(int(choice))
    params = checked(driver.cuGraphKernelNodeGetParams(node), "reading the node that chooses")
    params.kernelParams = launch.address
    params.func = function
    checked(driver.cuGraphKernelNodeSetParams(node, params), "telling the node that chooses which nodes there are")
    return len(owned)


def capture_switch(select: Select, bodies: Sequence[Body], side: torch.cuda.Stream) -> None:
    """Add the choice and the bodies to the capture on the current stream, in mode "switch".

    side: a stream that does nothing else. The choice must be the index of a body even if costs are NaN: otherwise none
    would run.
    """
    from cuda.bindings import runtime

    graph, _ = _capture()
    handle = checked(runtime.cudaGraphConditionalHandleCreate(graph, 0, 0), "making a conditional node")
    select(int(handle))
    params = runtime.cudaGraphNodeParams()
    params.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
    params.conditional.handle = handle
    params.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeSwitch
    params.conditional.size = len(bodies)
    last = _capture()[1]
    node = checked(runtime.cudaGraphAddNode(graph, last, None, len(last), params), "making a conditional node")
    _continue_from([node])
    for body, into in zip(bodies, params.conditional.phGraph_out, strict=False):
        _captured(body, side, into)


def _capture() -> tuple[Any, list[Any]]:
    """The graph that the current stream is captured into, and the nodes that its next launch would depend on.

    Raises KernelError without a capture.
    """
    import torch
    from cuda.bindings import runtime

    stream = torch.cuda.current_stream().cuda_stream
    status, _, graph, last, _, _ = checked(runtime.cudaStreamGetCaptureInfo(stream), "reading the capture")
    if status != runtime.cudaStreamCaptureStatus.cudaStreamCaptureStatusActive:
        raise KernelError("no CUDA graph is being captured on the current stream")
    return graph, list(last)


def _continue_from(nodes: list[Any]) -> None:
    """Let the next launch on the current stream depend on these nodes alone."""
    import torch
    from cuda.bindings import runtime

    stream = torch.cuda.current_stream().cuda_stream
    flag = runtime.cudaStreamUpdateCaptureDependenciesFlags.cudaStreamSetCaptureDependencies
    done = runtime.cudaStreamUpdateCaptureDependencies(stream, nodes, None, len(nodes), flag)
    checked(done, "continuing the capture")


def _between(last: Sequence[Any], first: Any) -> list[Any]:
    """The nodes `last` and all that they depend on, up to but without `first`.

    Programmatic edges from `first` become full ones. Over a programmatic edge a kernel may begin before the other has
    ended, and what is about to be switched off must not have begun.
    """
    from cuda.bindings import runtime

    graph, _ = _capture()
    found: dict[int, Any] = {}
    todo = list(last)
    while todo:
        node = todo.pop()
        if int(node) == int(first) or int(node) in found:
            continue
        found[int(node)] = node
        count = checked(runtime.cudaGraphNodeGetDependencies(node, 0), "reading a captured body")[2]
        before, edges, _ = checked(runtime.cudaGraphNodeGetDependencies(node, count), "reading a captured body")
        for other, edge in zip(before, edges or [None] * len(before), strict=False):
            programmatic = runtime.cudaGraphDependencyType.cudaGraphDependencyTypeProgrammatic
            if edge is not None and edge.type == int(programmatic) and int(other) == int(first):
                checked(runtime.cudaGraphRemoveDependencies(graph, [other], [node], [edge], 1), "ordering a body")
                checked(runtime.cudaGraphAddDependencies(graph, [other], [node], None, 1), "ordering a body")
            todo.append(other)
    return list(found.values())


def _device_updatable(node: Any) -> int:
    """Make a captured kernel node one that kernels can switch. Returns its handle for the device."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_DEVICE_UPDATABLE_KERNEL_NODE
    value = driver.CUkernelNodeAttrValue()
    value.deviceUpdatableKernelNode.deviceUpdatable = 1
    of = driver.CUgraphNode(int(node))
    checked(driver.cuGraphKernelNodeSetAttribute(of, attribute, value), "letting a body's kernel be switched")
    value = checked(driver.cuGraphKernelNodeGetAttribute(of, attribute), "letting a body's kernel be switched")
    return int(value.deviceUpdatableKernelNode.devNode)
