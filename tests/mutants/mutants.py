"""All mutants."""

from __future__ import annotations

import diverse_mutants
import row_mutants
import score_mutants
import select_mutants
import stage_mutants
from mutation import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *diverse_mutants.MUTANTS,
    *row_mutants.MUTANTS,
    *score_mutants.MUTANTS,
    *select_mutants.MUTANTS,
    *stage_mutants.MUTANTS,
)
