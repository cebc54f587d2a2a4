"""The ids of the runs of a fake study."""


def run_ids(count: int) -> list[str]:
    return [f"{number:012x}" for number in range(count)]
