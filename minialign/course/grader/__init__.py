"""The grader: hostile notebooks, graded safely (`minialign course grade`).

grade.py         the whole run, one submission, one verdict; how it is kept safe
submission.py    what was asked, and what came
needed.py        which statements of a notebook an exercise needs
sandbox.py       where submissions run; worker.py runs inside it, behind the locks of locks.py
wire.py          what crosses the wall, and is believed
gradebook.py     grades.csv, feedback, the instructor's page
"""
