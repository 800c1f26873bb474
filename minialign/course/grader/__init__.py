"""The grader: hostile notebooks, graded safely (`minialign course grade`).

grade.py         the whole run, one submission, one verdict; how it is kept safe
submission.py    what was asked, and what came
needed.py        which statements of a notebook an exercise needs
sandbox.py       where submissions run, within the walls of walls.py; worker.py runs inside it, behind the locks of
                 locks.py, with the one folder of scratch.py to write to
wire.py          what crosses the wall, and is believed
gradebook.py     grades.csv, feedback, the instructor's page; kept.py remembers, similar.py finds answers that are alike
overrides.py     points by hand; formats.py: tables that a learning platform takes
"""
