"""The moments domain: mean and second moment of every value over random weights and data, from shapes alone.

A value is a polynomial in *sources*, each a random array known by its *lattice*: E x_i x_j for entries i, j that differ
in exactly the axes of a set, for every set of axes. Entries that differ in the same axes are taken as exchangeable, so
an array of rank r needs 2^r numbers, whatever its size; along an axis where that is not so (positions near a border
that convolutions pad with zeros) the figures hold a profile. The empty set is the second moment q; the set of the batch
axis alone is the covariance of two examples, the C map of mean-field theory; a sum over an axis of n entries is
n M[same] + n (n-1) M[different], a product with independent weights multiplies lattices, a broadcast copies one: so
pooling, normalization, attention, borders and correlated tokens are cases of one calculus.

Elementwise operations compose symbolically (`quadrature.Formula`), so that gelu is one function however many equations
it has; a nonlinear function of several sources takes their joint distribution as a new source. Backward, a cotangent is
a lattice too, of mean zero, taken as independent of the forward pass; every rule has its transpose.

Imports run one way: `lattice`, `values`, `polynomials`, `environment` (what a rule is given), the modules of rules,
`rules` (the table of them), `interpreter`, `spectrum`, `norms`, `logsumexp`, `roots`; `spread`, `backward`.

References: Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232); Xiao et al. 2018
(arXiv:1806.05393); Yang et al. 2019 (arXiv:1902.08129).
"""

from fixup_init.moments.backward import Cotangent, pull_back
from fixup_init.moments.complex_numbers import of_parts
from fixup_init.moments.interpreter import Interpreter
from fixup_init.moments.lattice import settled, total
from fixup_init.moments.logsumexp import LogSum, log_sums
from fixup_init.moments.norms import Normalization, has_squares
from fixup_init.moments.polynomials import moments_of
from fixup_init.moments.roots import Root, roots
from fixup_init.moments.segments import Segments, segment_softmax, segment_softmaxes
from fixup_init.moments.softmax import INSIDE, Softmax, softmax_of, softmax_powers, softmax_square, softmaxes
from fixup_init.moments.spread import Spread, of_values
from fixup_init.moments.values import Node, Trait, Value, fixed, gaussian, known, of_source, ones, unknown

__all__ = [
    "INSIDE", "Cotangent", "Interpreter", "LogSum", "Node", "Normalization", "Root", "Segments", "Softmax", "Spread",
    "Trait", "Value", "fixed", "gaussian", "has_squares", "known", "log_sums", "moments_of", "of_parts", "of_source",
    "of_values", "ones", "pull_back", "roots", "segment_softmax", "segment_softmaxes", "settled", "softmax_of",
    "softmax_powers", "softmax_square", "softmaxes", "total", "unknown",
]  # fmt: skip
