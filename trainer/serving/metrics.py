"""Counters of the service in the text format of Prometheus
(https://prometheus.io/docs/instrumenting/exposition_formats/), without its client library: everything runs in
one event loop, so there is nothing to lock."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """How many observations lie at or below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.sum = bounds, 0.0
        self._counts = [0] * (len(bounds) + 1)  # the last one: above every bound

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, **labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip([*self.bounds, "+Inf"], self._counts, strict=True):
            total += count
            yield f"{name}_bucket{_labels({**labels, 'le': str(bound)})} {total}"
        yield f"{name}_sum{_labels(labels)} {self.sum:.6f}"
        yield f"{name}_count{_labels(labels)} {total}"


class Metrics:
    """What one service counts. model: facts that become labels of gensr_model_info."""

    def __init__(self, model: Mapping[str, object]) -> None:
        self._model = {name: str(value) for name, value in model.items()}
        self._requests: Counter[tuple[str, str]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batch_size = Histogram(BATCH_SIZES)
        self._closed: Counter[str] = Counter()
        self._loads = {"used": 0, "refused": 0}

    def request(self, path: str, status: int, seconds: float) -> None:
        """One answered request. path: of a small fixed set, not what the client wrote."""
        self._requests[path, str(status)] += 1
        self._seconds.setdefault(path, Histogram(SECONDS)).observe(seconds)

    def batch(self, size: int) -> None:
        self._batch_size.observe(size)

    def closed(self, reason: str) -> None:
        """One connection that the service ended: too slow, or one too many."""
        self._closed[reason] += 1

    def model_replaced(self, model: Mapping[str, object]) -> None:
        """A newer version answers. This and model_refused() come from another thread."""
        self._model = {name: str(value) for name, value in model.items()}
        self._loads["used"] += 1

    def model_refused(self) -> None:
        """A newer version could not be used."""
        self._loads["refused"] += 1

    def text(self, queue_length: int) -> str:
        """All of it, in the exposition format."""
        lines = [
            *_head("gensr_requests_total", "counter", "Answered requests."),
            *(
                f"gensr_requests_total{_labels({'path': path, 'status': status})} {count}"
                for (path, status), count in sorted(self._requests.items())
            ),
            *_head("gensr_request_seconds", "histogram", "From the first byte to the last of the answer."),
            *(
                line
                for path, histogram in sorted(self._seconds.items())
                for line in histogram.lines("gensr_request_seconds", path=path)
            ),
            *_head("gensr_queue_length", "gauge", "Requests that wait for the model."),
            f"gensr_queue_length {queue_length}",
            *_head("gensr_batch_size", "histogram", "Requests computed together."),
            *self._batch_size.lines("gensr_batch_size"),
            *_head("gensr_connections_closed_total", "counter", "Connections that the service ended."),
            *(
                f"gensr_connections_closed_total{_labels({'reason': reason})} {count}"
                for reason, count in sorted(self._closed.items())
            ),
            *_head("gensr_model_loads_total", "counter", "Newer versions that the service has loaded."),
            *(
                f"gensr_model_loads_total{_labels({'result': result})} {count}"
                for result, count in self._loads.items()
            ),
            *_head("gensr_model_info", "gauge", "What answers; always 1."),
            f"gensr_model_info{_labels(self._model)} 1",
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _labels(labels: Mapping[str, str]) -> str:
    """{path="/score",status="200"}, or nothing."""
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
