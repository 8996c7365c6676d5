"""Alias of `python -m samf.scripts.convert_published_checkpoint`, for one release."""

import runpy

if __name__ == "__main__":
    runpy.run_module("samf.scripts.convert_published_checkpoint", run_name="__main__", alter_sys=True)
