"""What the system knows of a process that a test started or that one of its processes started."""

from pathlib import Path


def children(process_id: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def runs(process_id: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it goes while its file is read
        return False
