"""The bus beside its peers, measured on one machine: ``python -m benchmarks --help``.

No part of the installed package. ``world.py`` starts what is measured, ``peers/`` has one module for each
kind of peer (its worker and its client), ``load.py`` makes the calls, ``results.py`` and ``report.py`` say
what came of it.
"""
