"""All mutants."""

from __future__ import annotations

import row_mutants
import score_mutants
import select_mutants
import stage_mutants
from mutation import Mutant

MUTANTS: tuple[Mutant, ...] = (
    *row_mutants.MUTANTS,
    *score_mutants.MUTANTS,
    *select_mutants.MUTANTS,
    *stage_mutants.MUTANTS,
)
