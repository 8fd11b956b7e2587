"""The double's answers in the API's protobuf, which the SDK takes for samples and for model passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from tinker.proto import tinker_public_pb2 as pb

PROTOBUF = "application/x-protobuf"
MASK = -99999.0


def as_protobuf(answer: dict[str, Any]) -> bytes:
    message = _sample(answer) if "sequences" in answer else _model_pass(answer)
    raw: bytes = message.SerializeToString()
    return raw


def _sample(answer: dict[str, Any]) -> Any:
    found = pb.SampleResponse()
    for sequence in answer["sequences"]:
        reason = pb.STOP_REASON_STOP if sequence["stop_reason"] == "stop" else pb.STOP_REASON_LENGTH
        tokens, logprobs = np.array(sequence["tokens"], np.int32), np.array(sequence["logprobs"], np.float32)
        found.sequences.add(stop_reason=reason, tokens=tokens.tobytes(), logprobs=logprobs.tobytes())
    if (own := answer.get("prompt_logprobs")) is not None:
        found.prompt_logprobs = np.array([np.nan if p is None else p for p in own], np.float32).tobytes()
    if (top := answer.get("topk_prompt_logprobs")) is not None:
        k = max(len(row) for row in top if row is not None)
        rows = [row if row is not None else [(0, MASK)] * k for row in top]
        found.topk_prompt_logprobs.k, found.topk_prompt_logprobs.prompt_length = k, len(rows)
        found.topk_prompt_logprobs.token_ids = np.array([[i for i, _ in row] for row in rows], np.int32).tobytes()
        found.topk_prompt_logprobs.logprobs = np.array([[p for _, p in row] for row in rows], np.float32).tobytes()
    return found


def _model_pass(answer: dict[str, Any]) -> Any:
    found = pb.ForwardBackwardOutput(loss_fn_output_type=answer["loss_fn_output_type"], metrics=answer["metrics"])
    for output in answer["loss_fn_outputs"]:
        record = found.loss_fn_outputs.add(num_datums=1)
        for name, tensor in output.items():
            data = np.array(tensor["data"], np.float32).tobytes()
            batched = record.fields[name]
            batched.data, batched.dtype = data, pb.DTYPE_FLOAT32
            batched.offsets = np.array([0, len(data)], np.int64).tobytes()
            batched.trailing_shape.extend(tensor["shape"][1:])
    return found
