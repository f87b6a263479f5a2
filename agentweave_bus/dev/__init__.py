"""Development: files that change are taken up while a stack runs, and all agents can live in one process.

What serves them is the very code of a worker process. Nothing here decides who may call whom, and no check
is left out.
"""
