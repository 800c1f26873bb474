"""What the chapters ask: exercises in chapter_NN.py, whose list `exercises` is of all; questions in questions_NN.py."""
