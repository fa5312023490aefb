"""Everything random derives from one seed and a name, never from the order of tasks.

Who draws in another way, and why, is in docs/architecture.md under Randomness.
"""

import hashlib


def derived_seed(seed: int, name: str) -> int:
    """Seed of one of a run's random sequences.

    Parameters
    ----------
    seed : int
        The run's.
    name : str
        What is drawn, such as ``"weights"``.

    Returns
    -------
    int
        64 bits of the BLAKE2 hash of both.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
