"""The kinds of failures: how each is recognised, why it happens, and the smallest change.

The table was made by provoking each failure with torch 2.13 and reading what it says; the tests in
``tests/integration/test_explanations.py`` provoke them again. A release that says something else
only loses the advice: the first line of the error is told then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["FAILURES", "MISMATCHES", "FailureClass", "recognised"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureClass:
    """One kind of failure.

    Args:
        name: A short, stable name.
        pattern: What shows in the text of the error and its causes, each link as ``Type: message``,
            followed by ``@file:function`` of every frame that the errors went through.
        title: What stopped the core; may hold the pattern's groups and ``{message}``, the first
            line of the root error.
        why: Half a sentence, or ``""``.
        advice: The smallest change.
    """

    name: str
    pattern: re.Pattern[str]
    title: str
    why: str
    advice: str


def recognised(
    table: tuple[FailureClass, ...], text: str
) -> tuple[FailureClass, re.Match[str]] | None:
    """Return the first class of a table whose pattern shows in a text, with the match."""
    for failure in table:
        match = failure.pattern.search(text)
        if match is not None:
            return failure, match
    return None


_KEEP_TENSOR = (
    "Keep it a tensor: compute with the tensor itself instead of .item(), int(), float() or "
    ".tolist()"
)
_REWRITE = (
    "Rewrite the line with operators that ONNX has, compute it outside of the model, or describe "
    "it once with torch.onnx.register_custom_op_symbolic (used by the trace and script cores)"
)
_SCRIPT_WHY = "the script core compiles the source, and TorchScript is a subset of Python"
_NO_TRANSLATION = "The operator {operator} has no ONNX translation in this core"
_OPERATOR = (
    r"(?:No ONNX function found for <OpOverload\(op='(?P<operator>{0})'"
    r"|Exporting the operator '(?P<operator2>{0})'"
    r"|Unsupported: ONNX export of operator (?P<operator3>{0})"
    r"|UnsupportedOperatorException: (?P<operator4>{0})"
    r"|operator '?(?P<operator5>aten::{0})'?"
    r"|target: (?P<operator6>aten\.{0})"
    r"|NotImplementedError: (?P<operator7>aten[:._]{0})"
    r"|Occurred when translating (?P<operator8>{0})\))"
)


def _operator(names: str) -> re.Pattern[str]:
    """Recognise an untranslated operator; ``names`` is a pattern for its name."""
    return re.compile(_OPERATOR.format(names))


_ANY = r"[\w.:]+\w"

FAILURES: tuple[FailureClass, ...] = (
    # --- the machine ----------------------------------------------------------------------------
    FailureClass(
        name="out of memory",
        pattern=re.compile(
            r"(?m)^(?:MemoryError|OutOfMemoryError)\b|can't allocate memory|out of memory"
            r"|std::bad_alloc|Failed to allocate memory"
        ),
        title="Memory ran out",
        why="an export holds the weights several times and runs the example once more",
        advice="Give a smaller example with inputs=, or export where there is more memory",
    ),
    FailureClass(
        name="crash",
        pattern=re.compile(
            r"died with <Signals\.(?P<signal>\w+)|terminated abruptly|exit(?:ed|code)?\D{1,24}-\d+"
            r"|Segmentation fault"
        ),
        title="The process that exported crashed",
        why="torch failed below Python, where nothing can be caught",
        advice="Choose another core with core=, and report the reproduction to PyTorch",
    ),
    FailureClass(
        name="too large",
        pattern=re.compile(
            r"2 ?Gi?B limit|exceeds? (?:the )?maximum protobuf size"
            r"|EncodeError: Failed to serialize"
        ),
        title="The graph is larger than the 2 GB that a protobuf file can hold",
        why="a tensor that is no parameter or buffer lies inside the graph itself",
        advice="Register large constants as buffers, so that they go to a data file of their own",
    ),
    # --- values that the graph does not have ------------------------------------------------------
    FailureClass(
        name="distribution arguments",
        pattern=re.compile(r"(?s)data-dependent expression.*@\S*torch/distributions/"),
        title="A data-dependent check of the arguments of a distribution",
        why="the check is a Python `if` on values, which the recorded graph does not have",
        advice="Build the distribution with validate_args=False",
    ),
    FailureClass(
        name="data-dependent branch",
        pattern=re.compile(
            r"data-dependent expression Eq\([uz]\d+, 1\)"
            r"|[Dd]ata-dependent (?:branching|control flow)"
        ),
        title="Data-dependent branch: Python's `if`, `while`, `and` or `assert` on a tensor",
        why="the value is not known while the model is recorded, and one way only would be kept",
        advice=(
            "Compute both ways and choose with torch.where(condition, a, b), or write it as "
            "torch.cond(condition, f, g, operands)"
        ),
    ),
    FailureClass(
        name="data-dependent number",
        pattern=re.compile(
            r"data-dependent expression [^\n]*zu?f\d|extract specialized (?:integer|float)"
            r"|DataDependentOutputException|_local_scalar_dense"
        ),
        title="Data-dependent Python number, made from a tensor",
        why="the number would become a constant of the graph",
        advice=_KEEP_TENSOR,
    ),
    FailureClass(
        name="data-dependent size",
        pattern=re.compile(
            r"GuardOnDataDependentSymNode|DynamicOutputShapeException|PendingUnbackedSymbol"
            r"|data-dependent"
        ),
        title="Data-dependent size: how many elements there are depends on their values",
        why="what follows needs to know the size while the model is recorded",
        advice=(
            "Keep the size fixed, with torch.where(mask, x, 0) instead of x[mask] or nonzero(), or "
            "state what is always true of it with torch._check(...)"
        ),
    ),
    FailureClass(
        name="python math",
        pattern=re.compile(r"No ONNX function found for <(?P<operator>(?:built-in )?function \w+)"),
        title="Python's {operator} on a number taken from a tensor or a size",
        why="only operations on tensors have a translation",
        advice="Use torch's own function on the tensor, torch.sqrt(x.sum()) for math.sqrt(x.sum())",
    ),
    # --- sizes ----------------------------------------------------------------------------------
    FailureClass(
        name="size must be a multiple",
        pattern=re.compile(
            r"Mod\(\w+, (?P<step>\d+)\)|suggested fixes?[^\n]*\n[^\n]*= (?P<step2>\d+)\*"
        ),
        title="A dynamic dimension must be a multiple of {step}",
        why="a line of the model divides it",
        advice="Pad to a multiple of {step} inside of forward, or keep the dimension static",
    ),
    FailureClass(
        name="dimension specialised",
        pattern=re.compile(
            r"inferred a static shape of (?P<size>\d+) for dimension (?P<dim>\S+?)\.?(?:\s|$)"
            r"|values of (?P<dim2>[^=\n]+?) = [^\n]*inferred to be a constant \((?P<size2>\d+)\)"
            r"|Constraints violated \((?P<dim3>[^)]+)\)"
        ),
        title="The dimension {dim} is specialised to {size}",
        why="a line compares it with a number, or combines it with a tensor of a fixed size",
        advice=(
            "Take sizes from x.shape where they are used, and make tensors with x.new_zeros(...) "
            "instead of parameters, buffers or constants of the example's size"
        ),
    ),
    FailureClass(
        name="concrete size needed",
        pattern=re.compile(
            r"(?:symbolic|Symbolic) sizes/strides|expected to contain only concrete integers"
            r"|failed to unpack the object at pos"
        ),
        title="A function that takes no symbolic size",
        why="it is written in C++ and needs the number itself",
        advice=(
            "Make tensors from the sizes of others with torch functions (x.new_zeros, "
            "torch.rand_like), or keep this dimension static"
        ),
    ),
    # --- structure and Python -------------------------------------------------------------------
    FailureClass(
        name="numpy",
        pattern=re.compile(
            r"numpy\._ArrayFunctionDispatcher|[Nn]um[Pp]y\(\)|numpy\.ndarray|\.numpy\b"
            r"|@\S*torch/_numpy/|@\S*/numpy/"
        ),
        title="NumPy inside of the model ({message})",
        why="what NumPy computes is not recorded",
        advice="Use the torch function of the same name instead of np., and drop .numpy()",
    ),
    FailureClass(
        name="data pointer",
        pattern=re.compile(r"[Cc]annot access data pointer|has no storage|data_ptr"),
        title="Something asks for the memory of a tensor (copy.deepcopy, pickle or a C extension)",
        why="while the model is recorded tensors have no memory",
        advice="Use x.clone() instead of copy.deepcopy(x), or wrap the call as a torch.library op",
    ),
    FailureClass(
        name="scripted inside",
        pattern=re.compile(r"not part of the active trace|must be registered as submodules"),
        title="A compiled module (torch.jit.script) is called inside",
        why="the tracer of torch.onnx does not take compiled modules",
        advice="Keep the plain module, and let core='script' compile it if it has branches",
    ),
    FailureClass(
        name="compiled inside",
        pattern=re.compile(r"dynamo-optimized function"),
        title="torch.compile or a control-flow operator (torch.cond, map, scan) is inside",
        why="the trace and script cores cannot record what dynamo has compiled",
        advice="Leave it to core='dynamo', or call the plain module (compiled._orig_mod)",
    ),
    FailureClass(
        name="higher-order operator",
        pattern=re.compile(r"UncapturedHigherOrderOpError|Higher Order Operator|HigherOrderOp"),
        title="A control-flow operator whose function cannot be captured ({message})",
        why="its function must be pure: no aliases of its inputs, no mutation, equal shapes",
        advice="Return x.clone() instead of an input, or write the loop with plain operators",
    ),
    FailureClass(
        name="gradient inside",
        pattern=re.compile(
            r"@\S*torch/_functorch/(?:vmap|eager_transforms|apis)"
            r"|'Tensor' object has no attribute 'constant'|Unsupported value kind: Tensor"
            r"|does not require grad|@\S*torch/autograd/__init__"
        ),
        title="forward itself takes a gradient or uses torch.func (vmap, grad)",
        why="the recording of a gradient inside of a recording is not supported",
        advice="Write the derivative out, replace vmap by a batched expression, or leave it out",
    ),
    FailureClass(
        name="custom autograd function",
        pattern=re.compile(r"attribute 'Subgraph'|PythonOp|@\S*torch/autograd/function"),
        title="A torch.autograd.Function",
        why="it hides its operators from this core",
        advice=(
            "Call its plain computation in eval mode (`f(x) if self.training else plain(x)`); the "
            "gradient is not needed in an exported model"
        ),
    ),
    FailureClass(
        name="generator",
        pattern=re.compile(r"type 'Generator'|torch\.Generator|object of type Generator"),
        title="A torch.Generator inside of forward",
        why="ONNX has no state of a random number stream",
        advice="Draw the numbers outside of the model and give them as an input",
    ),
    FailureClass(
        name="state kept in lists",
        pattern=re.compile(
            r"assigned during export|failed to convert Python type: '(?:list|dict)'"
            r"|\(type 'List\[|\(type 'Dict\["
            r"|attributes? \S+ (?:was|were) assigned"
        ),
        title="forward changes a list, a dict or an attribute of the module",
        why="a graph computes outputs and remembers nothing",
        advice="Return the value as an output, or write it in training only (`if self.training:`)",
    ),
    FailureClass(
        name="script: variable arguments",
        pattern=re.compile(r"can't take variable number of arguments"),
        title="TorchScript takes no *args, **kwargs or keyword-only defaults",
        why=_SCRIPT_WHY,
        advice="Name the arguments: forward(self, x: Tensor, mask: Tensor)",
    ),
    FailureClass(
        name="script: annotation missing",
        pattern=re.compile(
            r"Tensor \(inferred\)|not annotated|Expected type hint|unsupported index type 'str'"
            r"|Unknown type annotation|Expected a value of type"
        ),
        title="TorchScript lacks a type annotation ({message})",
        why="what has no annotation is taken for a Tensor",
        advice="Annotate it, e.g. `def forward(self, x: Dict[str, Tensor], scale: int)`",
    ),
    FailureClass(
        name="script: no source",
        pattern=re.compile(r"could not get source code|Can't get source for"),
        title="TorchScript finds no source of a function ({message})",
        why="it compiles text, and this function was made at run time (exec, a decorator, a shell)",
        advice="Define it in a file, or leave the module to core='dynamo' and core='trace'",
    ),
    FailureClass(
        name="script: context manager",
        pattern=re.compile(
            r"(?s)(?:UnsupportedNodeError|NotSupportedError|Unknown builtin op|RuntimeError).*"
            r"\n\s*with [^\n]+:\n\s*~+ <--- HERE|__enter__|__exit__"
        ),
        title="TorchScript cannot compile this context manager ({message})",
        why=_SCRIPT_WHY,
        advice="Take it out of forward; in eval mode gradients and autocast are off already",
    ),
    FailureClass(
        name="script: unsupported python",
        pattern=re.compile(
            r"UnsupportedNodeError|FrontendError|NotSupportedError|<--- HERE|Unknown builtin op"
            r"|single top-level function|cannot create weak reference|torch\.jit\.script"
        ),
        title="TorchScript cannot compile this Python ({message})",
        why=_SCRIPT_WHY,
        advice="Move it out of forward, or mark what the export does not need @torch.jit.unused",
    ),
    FailureClass(
        name="structure",
        pattern=re.compile(
            r"Tracer cannot set value trace|Only tensors, lists, tuples|cannot be traced"
            r"|[Uu]nsupported (?:input|output) type|pytree|Dictionary inputs|Type '.*' cannot"
        ),
        title="A value that is no tensor among inputs or outputs ({message})",
        why="a graph takes and gives tensors",
        advice="Return tensors, or tuples, lists, dicts or dataclasses of tensors",
    ),
    # --- tensors --------------------------------------------------------------------------------
    FailureClass(
        name="attention view",
        # It was captured, and fails when decomposed; the user's own views fail in step 1.
        pattern=re.compile(r"(?s)step 2/3.*Cannot view a tensor"),
        title="The fused attention is taken apart into a view that its layout forbids",
        why="torch's decomposition of scaled_dot_product_attention assumes another layout",
        advice=(
            "Run it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or call .contiguous() "
            "on its result (pytorch/pytorch#136543)"
        ),
    ),
    FailureClass(
        name="view",
        pattern=re.compile(r"Cannot view a tensor|view size is not compatible"),
        title="A view that the layout of its tensor forbids",
        why="the tensor is not contiguous there",
        advice="Use .reshape(...) instead of .view(...)",
    ),
    FailureClass(
        name="in-place",
        pattern=re.compile(
            r"set_ on a graph input|[Ii]n-?place operation|directly modify sizes"
            r"|observable data dependence|[Mm]utations?\b|[Aa]lias|'aten::(?:resize|set)_?'"
        ),
        title="An in-place change of a tensor's size, memory or alias ({message})",
        why="a graph has values and no memory that they share",
        advice="Make a new tensor: x = x + 1, x = torch.cat(...), or x.clone() before the change",
    ),
    FailureClass(
        name="complex",
        pattern=re.compile(
            r"complex-valued|number type: complex|ComplexFloat|ComplexDouble|complex(?:64|128)"
            r"|'aten::(?:complex|view_as_complex|view_as_real|polar|(?:i|ir|r)?fft_?\w*|fft_\w+)'"
        ),
        title="Complex numbers ({message})",
        why="ONNX has no complex numbers, and this core translates few operators on them",
        advice="Compute with the real and the imaginary part, in tensors of their own",
    ),
    FailureClass(
        name="parametrization",
        pattern=re.compile(
            r"(?s)(?:No ONNX function|Exporting the operator|<--- HERE).*"
            r"@\S*torch/nn/utils/parametriz"
        ),
        title="The parametrization of a weight ({message})",
        why="it computes the weight from others in each call, with operators that ONNX lacks",
        advice="Fix the weight with torch.nn.utils.parametrize.remove_parametrizations when done",
    ),
    FailureClass(
        name="random operator",
        pattern=_operator(
            r"(?:aten\.|aten::|prims\.)?_?(?:standard_gamma|gamma|poisson|multinomial|bernoulli_?"
            r"|normal_?|rand\w*|dirichlet\w*|sample_dirichlet|exponential_?|geometric_?|cauchy_?"
            r"|log_normal_?|binomial)"
        ),
        title="The random operator {operator} has no ONNX translation in this core",
        why="its numbers could not be compared with PyTorch's either",
        advice="Draw outside of the model and give the numbers as an input, or return the mean",
    ),
    FailureClass(
        name="tensor layout",
        pattern=re.compile(
            r"(?P<operator>aten[.:]+_?(?:to_)?sparse\w*|aten[.:]+_?nested\w*"
            r"|aten[.:]+(?:de)?quantize\w*|aten[.:]+_to_sparse\w*)"
        ),
        title="{operator} makes or reads a sparse, nested or quantized tensor",
        why="ONNX has dense tensors of plain numbers only",
        advice="Use dense tensors (.to_dense(), padding and a mask), or quantize the ONNX model",
    ),
    FailureClass(
        name="operator without shapes",
        pattern=re.compile(
            r"UnsupportedOperatorException: (?P<operator>(?!aten\.|prims?\.)[\w.]+)"
            r"|(?P<operator2>\w+::[\w.]+): attempted to run this operator with Meta"
        ),
        title="The operator {operator} does not say which shape it gives",
        why="torch.export needs the shape of the result without computing it",
        advice="Describe it with torch.library.register_fake, or rewrite the line without it",
    ),
    FailureClass(
        name="custom operator",
        pattern=re.compile(
            r"unrecognized namespace (?P<operator>\w+::\w+)"
            r"|No ONNX function found for "
            r"<OpOverload\(op='(?P<operator2>(?!aten\.|prims?\.)\w+\.\w+)'"
        ),
        title="The custom operator {operator} has no ONNX translation",
        why="only its library knows what it computes",
        advice=(
            "Call a plain PyTorch version of it while torch.onnx.is_in_onnx_export(), or describe "
            "it with torch.onnx.register_custom_op_symbolic"
        ),
    ),
    FailureClass(
        name="case of an operator",
        pattern=re.compile(
            r"Unsupported: ONNX export of operator (?P<operator>\w+), (?P<case>[^.\n]+)\."
            r"|NotImplementedError: (?P<operator2>aten\w+) (?P<case2>[^\n]+?)\.?(?:\n|$)"
        ),
        title="The operator {operator} has no ONNX translation for this case ({case})",
        why="",
        advice="Call it in a way that avoids this case, or rewrite the line with other operators",
    ),
    FailureClass(
        name="operator",
        pattern=_operator(_ANY),
        title=_NO_TRANSLATION,
        why="",
        advice=_REWRITE,
    ),
)
"""What a core can raise; the first that matches counts, so the narrower ones come first."""


MISMATCHES: tuple[FailureClass, ...] = (
    FailureClass(
        name="dtype without a kernel",
        pattern=re.compile(r"NOT_IMPLEMENTED.*implementation for (?P<operator>\w+)\("),
        title="",
        why="ONNX Runtime has no kernel of {operator} for this dtype",
        advice="Export in float32 (precision='fp32'), or cast to float32 around that line",
    ),
    FailureClass(
        name="out of memory",
        pattern=re.compile(r"Failed to allocate memory|bad_alloc"),
        title="",
        why="the graph asks for more memory than there is",
        advice="Give a smaller example with inputs=, or export where there is more memory",
    ),
    FailureClass(
        name="dimension specialised",
        pattern=re.compile(r"should be dynamic and is fixed to (?P<size>\d+)"),
        title="",
        why="a line of the model made the size a constant",
        advice="Take sizes from x.shape where they are used, not from constants of size {size}",
    ),
    FailureClass(
        name="invalid graph",
        pattern=re.compile(
            r"INVALID_GRAPH|INVALID_PROTOBUF|onnx\.checker refuses|Type Error"
            r"|does not load the model"
        ),
        title="",
        why="the exporter wrote a graph that is not valid, mostly two dtypes where one must be",
        advice="Choose another core with core=, or make the dtypes in that operator equal",
    ),
    FailureClass(
        name="shape baked in",
        pattern=re.compile(
            r"ONNX Runtime fails|RUNTIME_EXCEPTION|Non-zero status|INVALID_ARGUMENT|has shape "
        ),
        title="",
        why="a size of the example was kept in the graph as a constant",
        advice="Take sizes from x.shape where they are used, without int(), and use -1 in reshapes",
    ),
)
"""What a proof can find wrong, apart from numbers."""
