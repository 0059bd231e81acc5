"""What the client makes of answers that are not as they should be."""

from __future__ import annotations

from spikeless.client import _decoded_status
from spikeless.formats.protos import get_model_status_pb2


def test_a_message_that_is_no_utf_8_hides_no_state() -> None:
    response = get_model_status_pb2.GetModelStatusResponse()
    for version, message in ((1, ""), (3, "signature XXX is unknown")):
        status = response.model_version_status.add(version=version, state=50)
        status.status.error_message = message
    assert _decoded_status(response.SerializeToString()) == response
    damaged = response.SerializeToString().replace(b"XXX", b"\xff\xfe\x80")
    versions = _decoded_status(damaged).model_version_status
    assert [(one.version, one.state) for one in versions] == [(1, 50), (3, 50)]
    assert (
        versions[1].status.error_message
        == "signature \N{REPLACEMENT CHARACTER}" + 2 * "\ufffd" + " is unknown"
    )
