"""Prepares a folder of images, and saves every image as a part.

Usage: prepare_folder.py FOLDER DATA_DIR kill N    kills this process before the Nth part is complete
                                         wait N    prints "halfway" there, and waits for a line of standard input
                                         size SIZE DATA_DIR is a file system of this size, and then one of 100 MB
"""

import itertools
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from cnnjax import UserError
from cnnjax.data import image_parts
from cnnjax.data.image_folder import prepare_folder

path, data_dir, mode, value = sys.argv[1:]
image_parts._SIZE = 0
parts = itertools.count(1)
say = partial(print, flush=True)


def at_part(event, args):
    if (
        event == "os.rename"
        and str(args[1]).endswith(".json")
        and ".parts/" in str(args[1])
        and next(parts) == int(value)
    ):
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        say("halfway")
        sys.stdin.readline()


def prepare():
    try:
        say(prepare_folder(Path(path), Path(data_dir), image_shape=(64, 64, 3), say=say))
    except UserError as error:
        say(error)


if mode == "size":
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={value}", "tmpfs", data_dir], check=True)
    prepare()
    say("left:", *sorted(path.name for path in Path(data_dir).iterdir()))
    subprocess.run(["mount", "-o", "remount,size=100M", data_dir], check=True)
else:
    sys.addaudithook(at_part)
prepare()
