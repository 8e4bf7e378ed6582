"""The mesh of devices of a run."""

from dataclasses import dataclass, fields

from mc_core.checks import ConfigError, raise_config_error
from mc_core.errors import UserError


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices.

    Attributes:
        data: devices that share a batch and hold the same parameters. -1, on at most one axis: the
            devices that are left. A CPU has one device, unless the sizes ask for more.
        fsdp: devices that share a batch and split every parameter along the model's width.
        heads: devices that split heads and the hidden layer of the feed-forward block.
        context: devices that split the tokens of a sequence.
    """

    data: int = -1
    fsdp: int = 1
    heads: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise_config_error("MeshConfig", axis, size, ">= 1, or -1 for what is left")
        if list(self.sizes.values()).count(-1) > 1:
            open_axis = [axis for axis, size in self.sizes.items() if size == -1][1]
            raise_config_error("MeshConfig", open_axis, -1, ">= 1, if another axis is -1")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by axis."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def cpu_sizes(self) -> dict[str, int]:
        """The sizes on the CPU of a single process, where -1 is 1."""
        return {axis: max(size, 1) for axis, size in self.sizes.items()}

    @property
    def cpu_devices(self) -> int:
        """The number of devices into which a single process splits its CPU."""
        count = 1
        for size in self.cpu_sizes.values():
            count *= size
        return count


def parse_mesh(text: str, name: str = "--mesh") -> MeshConfig:
    """Parse `data=2,heads=4`; axes that are not named have size 1.

    Raises:
        UserError: the text has another form, or a size is not allowed.
    """
    sizes = {"data": 1}
    for word in text.split(","):
        axis, equals, size = word.strip().partition("=")
        if axis not in MeshConfig().sizes or not equals or not size.removeprefix("-").isdigit():
            raise UserError(f"{name} {text}: must have the form data=2,fsdp=2,heads=2,context=1")
        sizes[axis] = int(size)
    try:
        return MeshConfig(**sizes)
    except ConfigError as error:
        raise UserError(f"{name} {text}: {error.problem}") from error
