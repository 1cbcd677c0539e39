"""The problems of the study, one file for each kind of data."""

from example.study.digits import FIVE_STANDARDISED, FIVE_TASKS, TWO_DIGITS
from example.study.flights import FLIGHTS
from example.study.molecules import MOLECULES
from example.study.problem import Problem

PROBLEMS: dict[str, Problem] = {
    problem.name: problem for problem in (FIVE_TASKS, FIVE_STANDARDISED, TWO_DIGITS, FLIGHTS, MOLECULES)
}
