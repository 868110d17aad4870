"""Runs a command in a terminal, closes the terminal when it shows some text, and prints the exit status.

Until the command ends it receives SIGHUP again and again, as from a shell that passes it on. Another signal could be
handled before that of the closed terminal.

Usage: terminal.py TEXT COMMAND...
"""

import os
import pty
import signal
import sys
import time

text, *command = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(command[0], command)
shown = b""
while text.encode() not in shown:
    shown += os.read(terminal, 1024)  # EIO if the command ends too early.
os.close(terminal)
while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.001)
print(os.waitstatus_to_exitcode(ended[1]))
