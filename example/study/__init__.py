"""The study: every balancer on five real problems, all tuned with the same budget, from several seeds.

``python -m example study`` trains what is not in its results yet and writes ``results.csv``, a row per run,
``table.md``, with a verdict for each problem, and a figure for each. :mod:`example.study.methods` is the whole grid of
what is tried; :mod:`example.study.problems` has the problems.
"""
