"""`python -m samf.data.shards pack …`, which is `samf data pack …`."""

import sys

from samf.data.shards.command import main

if __name__ == "__main__":
    if sys.argv[1:2] != ["pack"]:
        sys.exit("usage: python -m samf.data.shards pack DATA --slice_cache FOLDER --processor MODEL --out ADDRESS")
    sys.exit(main(sys.argv[2:]))
