"""Program that reads an array of structs of a MATLAB file, and prints it as JSON.

SciPy crashes on some damaged files. In a process of its own it takes nothing else with it. So this file imports nothing
of the package, and is started by `matlab.read_structs` by its path.
"""

import json
import math
import sys
from typing import Any

MAX_STRUCTS = 1_000_000
MAX_MEMORY = 4 << 30


def read(path: str, variable: str) -> dict[str, Any]:
    """Return the names of all variables, and of `variable` the number of structs, and them if they are not too many."""
    from scipy.io import loadmat, whosmat

    found = {name: (shape, kind) for name, shape, kind in whosmat(path)}
    shape, kind = found.get(variable, ((), ""))
    answer: dict[str, Any] = {"variables": sorted(found), "count": math.prod(shape) if kind == "struct" else None}
    if answer["count"] is not None and 0 <= answer["count"] <= MAX_STRUCTS:
        array = loadmat(path, variable_names=[variable], squeeze_me=True)[variable].reshape(-1)
        answer["structs"] = [{name: text(row[name]) for name in array.dtype.names or ()} for row in array]
    return answer


def text(value: Any) -> str:
    """Return a number or a text as text, an integer without a point; empty for what is neither."""
    if isinstance(value, str):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return ""
    return str(int(number)) if number.is_integer() else str(number)


def limit_memory() -> None:
    """Refuse more memory than any published file needs, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    limit_memory()
    print(json.dumps(read(sys.argv[1], sys.argv[2])))
