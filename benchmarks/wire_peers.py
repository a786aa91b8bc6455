"""An adapter's tensors as bytes, back again, and averaged, by what federated code uses for it.

Tensors come by name, each in memory of its own, as an ordinary model's do (of a view torch.save would write the whole
buffer). Every way keeps its defaults. None of them says on arrival whether a message is of this model or round, or
whether its values are finite. What travels is checked by

* safetensors: header, offsets and sizes; nothing of the values.
* torch.save: it writes a CRC32 a tensor, which torch.load does not look at; ``weights_only`` bounds what is unpickled.
* Flower, ArrayRecord: SHA-256 of every object when it is sent, compared by the store between, not by who reads it.
* Flower, ndarrays_to_parameters: NumPy's header of each array.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, RecordDict

Tensors = Mapping[str, Tensor]
NUM_EXAMPLES = "num-examples"  # the weight's name that FedAvg looks for unless told otherwise


@dataclass(frozen=True)
class Way:
    """encode: what travels, from tensors by name. decode: tensors by name, from what travels and the names in order.

    relay: what a receiver gets of what was sent, where a server between repacks it; in nobody's time.
    """

    encode: Callable[[Tensors], Any]
    decode: Callable[[Any, Sequence[str]], Tensors]
    relay: Callable[[Any], Any] = lambda sent: sent


def _torch_save(tensors: Tensors) -> bytes:
    file = BytesIO()
    torch.save(dict(tensors), file)
    return file.getvalue()


def _torch_load(message: bytes, _: Sequence[str]) -> Tensors:
    return torch.load(BytesIO(message), weights_only=True, map_location="cpu")


@dataclass(frozen=True)
class Pushed:
    """A Flower message in flight: the tree of its objects' names, and a protobuf for each object; all serialised."""

    tree: bytes
    objects: Mapping[str, bytes]


def flower_push(tensors: Tensors, num_examples: int = 1) -> Pushed:
    """A state dict and its sample count, as a ClientApp's reply leaves the client.

    In its time: NumPy's format for every array, names by SHA-256, and its own push with its pool of threads, which
    puts each object into a PushObjectRequest and serialises it. Not in it: HTTP, the reply's metadata, the store at
    the other end.
    """
    from flwr.app import ArrayRecord, MetricRecord, RecordDict
    from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import push_objects

    sent: dict[str, bytes] = {}

    def send(request: PushObjectRequest) -> PushObjectResponse:
        sent[request.object_id] = request.SerializeToString(deterministic=True)
        return PushObjectResponse(stored=True)

    metrics = MetricRecord({NUM_EXAMPLES: num_examples})
    content = RecordDict({"arrays": ArrayRecord(dict(tensors)), "metrics": metrics})
    with no_object_id_recompute():
        tree, objects = get_object_tree(content), get_all_nested_objects(content)
        push_objects(objects, make_push_object_fn_protobuf(send, Node(node_id=1), run_id=1, session_id="1"))
    return Pushed(tree.SerializeToString(deterministic=True), sent)


def flower_relay(pushed: Pushed) -> Pushed:
    """What the server's store makes of a pushed message: the same objects as answers to who pulls them."""
    from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest

    def answer(request: bytes) -> bytes:
        content = PushObjectRequest.FromString(request).object_content
        return PullObjectResponse(object_found=True, object_available=True, object_content=content).SerializeToString()

    return Pushed(pushed.tree, {name: answer(request) for name, request in pushed.objects.items()})


def flower_pull(message: Pushed) -> RecordDict:
    """The records of a relayed message, by Flower's own pull with its pool of threads; their arrays stay serialised."""
    from flwr.app import RecordDict
    from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest, PullObjectResponse
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

    def ask(request: PullObjectRequest) -> PullObjectResponse:
        request.SerializeToString(deterministic=True)
        return PullObjectResponse.FromString(message.objects[request.object_id])

    return pull_and_inflate_object_from_tree(
        ObjectTree.FromString(message.tree),
        make_pull_object_fn_protobuf(ask, Node(node_id=1), run_id=1),
        lambda _: None,  # tells the server that the message has arrived
        return_type=RecordDict,
    )


def _flower_decode(message: Pushed, _: Sequence[str]) -> Tensors:
    return flower_pull(message).array_records["arrays"].to_torch_state_dict()


def flower_fedavg(records: Iterable[RecordDict]) -> ArrayRecord:
    """The arrays' mean weighted by sample counts, by the function that ``FedAvg.aggregate_train`` calls for it.

    It reads each array from NumPy's format, sums in the arrays' own dtype, and serialises the mean again.
    """
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    return aggregate_arrayrecords(list(records), NUM_EXAMPLES)


def _parameters(tensors: Tensors) -> bytes:
    """The arrays in order, without names, as clients of ``NumPyClient``'s kind send them: one protobuf."""
    from flwr.common import ndarrays_to_parameters
    from flwr.common.serde import parameters_to_proto

    arrays = [tensor.cpu().numpy() for tensor in tensors.values()]
    return parameters_to_proto(ndarrays_to_parameters(arrays)).SerializeToString(deterministic=True)


def _from_parameters(message: bytes, names: Sequence[str]) -> Tensors:
    from flwr.common import parameters_to_ndarrays
    from flwr.common.serde import parameters_from_proto
    from flwr.proto.transport_pb2 import Parameters

    arrays = parameters_to_ndarrays(parameters_from_proto(Parameters.FromString(message)))
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def mean_by_hand(messages: Iterable[bytes], weights: Sequence[float]) -> Tensors:
    """Σ w v / Σ w of safetensors files in float32, one file read and added at a time: FedAvg written with care."""
    mean: dict[str, Tensor] = {}
    for message, weight in zip(messages, weights, strict=True):
        share = weight / sum(weights)
        for name, tensor in safetensors.torch.load(message).items():
            mean[name] = mean[name].add_(tensor, alpha=share) if name in mean else tensor * share
    return mean


def has_flower() -> bool:
    """Whether Flower is installed; a warning says so where it is not, since its columns are then missing."""
    if find_spec("flwr") is not None:
        return True
    warnings.warn("flwr is not installed, so Flower is left out: it comes with the extra [flower]", stacklevel=2)
    return False


def ways() -> dict[str, Way]:
    """Those that are installed."""
    found = {
        "safetensors": Way(
            lambda tensors: safetensors.torch.save(dict(tensors)), lambda m, _: safetensors.torch.load(m)
        ),
        "torch.save": Way(_torch_save, _torch_load),
    }
    if has_flower():
        found["Flower, ArrayRecord"] = Way(flower_push, _flower_decode, flower_relay)
        found["Flower, ndarrays_to_parameters"] = Way(_parameters, _from_parameters)
    return found
