"""Workers for tests of the supervisor: small programs that are ready, beat and end as a test wants."""

from __future__ import annotations

import sys
from pathlib import Path

from agentweave_bus.supervisor.worker_process import WorkerSpec

HEAD = """
import json, os, signal, sys, time
fd = int(os.environ['AGENTWEAVE_READY_FD'])
every = float(os.environ.get('AGENTWEAVE_BEAT_SECONDS', '1'))
def ready():
    os.write(fd, b'ready\\n')
def beat(handled=0, resident=0, idle_s=None, backlog=None, in_flight=0):
    told = dict(lag_s=0.0, in_flight=in_flight, handled=handled, resident=resident, connected=True, idle_s=idle_s,
        svid_s=None, backlog=backlog)
    os.write(fd, b'beat ' + json.dumps(told).encode() + b'\\n')
def stop(*_):
    print('stopped', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
"""
BEATS = "ready()\nwhile True:\n    beat()\n    time.sleep(every)\n"


class Program(WorkerSpec):
    """A worker whose program is the text in its ``class_path``."""

    def command(self) -> list[str]:
        assert self.class_path is not None
        return [sys.executable, "-S", "-c", HEAD + self.class_path]


def program(name: str, code: str = BEATS, **environment: str) -> WorkerSpec:
    return Program(name=name, config=Path("x.yaml"), class_path=code, environment=environment)
