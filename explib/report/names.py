"""Names of networks and criteria as people read them, and the criteria's colours."""

from explib import registry

NOT_MEASURED = "not measured yet"


def network_name(arch: str) -> str:
    """The label of a network, `ResNet-56`."""
    return registry.network(arch).label


def criterion_name(pruning_way: str, survivors: str = "") -> str:
    """The label of a criterion with its survivors, `B, random survivors`."""
    return registry.criterion(pruning_way).named(survivors)


def colour_of(pruning_way: str) -> str:
    """The colour of a criterion, in every figure."""
    return registry.criterion(pruning_way).colour
