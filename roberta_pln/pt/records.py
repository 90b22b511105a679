"""Teaches PyTorch's tree utilities to walk the records, which `torch.export` and `torch.func` need."""

from torch.utils import _pytree as pytree

from roberta_pln.outputs import RECORDS, ModelOutput
from roberta_pln.pt.encoder import Cache


def register(record: type[ModelOutput]) -> None:
    """Register one record: its present values are the children."""
    pytree.register_pytree_node(
        record,
        lambda output: (list(output.to_tuple()), output.keys()),
        lambda values, names: record(**dict(zip(names, values, strict=True))),
        serialized_type_name=f"{record.__module__}.{record.__name__}",
        to_dumpable_context=list,
        from_dumpable_context=tuple,
        flatten_with_keys_fn=lambda output: (
            [(pytree.GetAttrKey(name), value) for name, value in output.items()],
            output.keys(),
        ),
    )


for _record in RECORDS:
    register(_record)
pytree.register_pytree_node(
    Cache,
    lambda cache: (list(cache), None),
    lambda layers, _: Cache(layers),
    serialized_type_name=f"{Cache.__module__}.{Cache.__name__}",
)
