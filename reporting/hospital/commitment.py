"""Storage commitment: which of the images that a sender asks about are on the disk."""

from pathlib import Path
from typing import Any

from samf.reporting.hospital.address import PeerAddress
from samf.reporting.hospital.dicom_headers import read_header
from samf.reporting.hospital.image_store import ImageStore

_INSTANCE = "1.2.840.10008.1.20.1.1"  # of the push model
_ALL_STORED, _SOME_FAILED = 1, 2
_NO_SUCH_OBJECT, _CLASS_CONFLICT = 0x0112, 0x0119


def commitment_result(store: ImageStore, request: Any) -> tuple[int, Any]:
    """Return event type and information of the N-EVENT-REPORT for a request.

    Args:
        store: of the images.
        request: action information, a pydicom dataset.
    """
    from pydicom.dataset import Dataset

    asked = [
        (str(item.get("ReferencedSOPClassUID", "")), str(item.get("ReferencedSOPInstanceUID", "")))
        for item in request.ReferencedSOPSequence
    ]
    found = store.find(instance for _, instance in asked)
    stored, failed = [], []
    for kind, instance in asked:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = kind, instance
        reason = _failure(found.get(instance), kind)
        if reason is None:
            stored.append(item)
        else:
            item.FailureReason = reason
            failed.append(item)
    result = Dataset()
    result.TransactionUID = request.TransactionUID
    if stored:
        result.ReferencedSOPSequence = stored
    if failed:
        result.FailedSOPSequence = failed
    return _SOME_FAILED if failed else _ALL_STORED, result


def _failure(file: Path | None, kind: str) -> int | None:
    header = None if file is None else read_header(file)
    if header is None:
        return _NO_SUCH_OBJECT
    own = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    return None if str(own) == kind else _CLASS_CONFLICT


def answer_commitment(store: ImageStore, request: Any, association: Any, peer: PeerAddress | None, title: str) -> bool:
    """Report the result of a request to its sender, and return whether that worked.

    Args:
        store: of the images.
        request: action information.
        association: of the request; the report goes through it unless `peer` is given.
        peer: node to report to, by an association of its own.
        title: own AE title.

    Raises:
        RuntimeError: the association was released meanwhile.
    """
    event, result = commitment_result(store, request)
    if peer is None:
        return _report(association, event, result)
    from pynetdicom import AE, build_role
    from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

    entity = AE(title)
    entity.add_requested_context(StorageCommitmentPushModel)
    role = build_role(StorageCommitmentPushModel, scp_role=True)
    own = entity.associate(peer.host, peer.port, ae_title=peer.title, ext_neg=[role])
    try:
        return own.is_established and _report(own, event, result)
    finally:
        if own.is_established:
            own.release()


def _report(association: Any, event: int, result: Any) -> bool:
    from pynetdicom.sop_class import StorageCommitmentPushModel  # type: ignore[attr-defined]

    status, _ = association.send_n_event_report(result, event, StorageCommitmentPushModel, _INSTANCE)
    return bool(status) and status.Status == 0x0000
