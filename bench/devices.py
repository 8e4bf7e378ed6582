"""Names and notes for subjects on several devices."""

DEVICES_NOTE = (
    "devices: the batch is split over them; of a CPU, one device runs a batch of small products on "
    "one core, two devices on two"
)


def named(name: str, devices: int) -> str:
    """Return a subject's name, with the number of devices if there are several."""
    return name if devices == 1 else f"{name}, {devices} devices"
