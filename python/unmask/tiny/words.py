"""The words of the embedded model's small language: shared by the tokenizer (vocabulary) and the tasks (text)."""

from __future__ import annotations

import string

LETTERS = string.ascii_lowercase
DIGITS = string.digits
OPENERS = "([{"
CLOSERS = ")]}"
CLOSER_OF = dict(zip(OPENERS, CLOSERS, strict=True))

NAMES = "ann ben cara dan eva finn gina hugo iris jack kate leo mia noah olga paul".split()
CITIES = "paris rome oslo berlin madrid tokyo lima cairo delhi dublin vienna athens".split()
JOBS = "nurse baker pilot teacher farmer lawyer painter driver".split()
KEYS = "name age city job".split()
FUNCTION_NAMES = "f g h calc run solve apply make".split()

COMMANDS = "add sort reverse close json function pair finish".split()
"""First word of every prompt, one per task."""

FILLERS = (
    "low first near with sum in is and lives year old works as from to by the of takes larger smaller "
    "adds subtracts multiplies divides checks above below equals doubles squares halves negates"
).split()
CODE_WORDS = "def return max min".split()
OPERATORS = "+ - * / < > ==".split()
