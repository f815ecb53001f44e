"""Initialization, signal propagation and normalization-free training for any Flax model.

`structure` says what a model is, `plan` what each parameter gets and why, `init` draws it, `analyze` and `compare`
measure how the signal drifts with depth, `predict` says how it should, `verdicts` what that means, `checks` test it.
"""

from fixup_init import checks as checks
from fixup_init import initializers as initializers
from fixup_init import schemes as schemes
from fixup_init.analyze import analyze as analyze
from fixup_init.analyze import compare as compare
from fixup_init.frameworks import Function as Function
from fixup_init.frameworks import ModelError as ModelError
from fixup_init.initialize import init as init
from fixup_init.initialize import plan as plan
from fixup_init.jaxprs import UnknownPrimitiveError as UnknownPrimitiveError
from fixup_init.measurement import DataError as DataError
from fixup_init.optim import optimizer as optimizer
from fixup_init.plan import Entry as Entry
from fixup_init.plan import Plan as Plan
from fixup_init.predict import predict as predict
from fixup_init.propagation import Comparison as Comparison
from fixup_init.propagation import Place as Place
from fixup_init.propagation import Propagation as Propagation
from fixup_init.propagation import Row as Row
from fixup_init.propagation import Statistics as Statistics
from fixup_init.propagation import Weight as Weight
from fixup_init.schemes import Fixup as Fixup
from fixup_init.structure import Structure as Structure
from fixup_init.structure import StructureError as StructureError
from fixup_init.structure import structure as structure
from fixup_init.verdicts import Verdict as Verdict
from fixup_init.verdicts import verdicts as verdicts

__version__ = "0.1.0"
