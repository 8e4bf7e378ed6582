"""Words for subjects that run on several devices."""

ABOUT = (
    "devices: the batch is split over them; of a CPU, one device runs a batch of small products on "
    "one core, two devices on two"
)


def named(name: str, devices: int) -> str:
    """Return a subject's name that tells its devices, where they are several."""
    return name if devices == 1 else f"{name}, {devices} devices"
