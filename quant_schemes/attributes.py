"""Attributes by which PrimFuncs say what they are: the compiler sets them, targets decide on them.

`qcc.role`    dequantize (stored parts -> weight), dequantize_rows (stored parts, ids -> rows),
              quantize_activation (x, or x and its scale -> x rounded to int8 codes times scales),
              expert_linear (x, weights of all experts, ids -> each token times its experts),
              top_experts (scores -> ids), expert_order (ids -> the pairs, sorted by expert),
              causal_conv, delta_rule, sum_rule (rows of several sequences, what each keeps),
              repack (stored part -> a kernel's layout), setting (() -> a tensor that the runtime
              fills), linear, table_rows, or the name of a function that clients call
`qcc.setting` the name of a setting
`qcc.format`  WeightFormat.as_dict() of what a dequantize function reads
"""

ROLE = "qcc.role"
FORMAT = "qcc.format"
DEQUANTIZE, DEQUANTIZE_ROWS, REPACK = "dequantize", "dequantize_rows", "repack"
QUANTIZE_ACTIVATION = "quantize_activation"
SETTING, SETTING_NAME = "setting", "qcc.setting"
LINEAR, TABLE_ROWS = "linear", "table_rows"
EXPERT_LINEAR, TOP_EXPERTS, EXPERT_ORDER = "expert_linear", "top_experts", "expert_order"
CAUSAL_CONV, DELTA_RULE, SUM_RULE = "causal_conv", "delta_rule", "sum_rule"

# TVM's own: no schedule is wanted any more, and fusion leaves the function alone.
SCHEDULED = "tirx.is_scheduled"
OP_PATTERN, OPAQUE = "op_pattern", 8
