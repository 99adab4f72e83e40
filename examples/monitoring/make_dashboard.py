"""Writes ``dashboard.json``, a Grafana dashboard of the metrics of a compressing server.

python examples/monitoring/make_dashboard.py > examples/monitoring/dashboard.json
"""

import json
import sys

M = "sglang:metasoft_"
BY_MODEL = 'model_name=~"$model"'


def rate(name: str, by: str = "", labels: str = BY_MODEL) -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({M}{name}_total{{{labels}}}[$__rate_interval]))"


PANELS = (  # title, unit, kind, (legend, expression)...
    ("Requests that decode, and what they save", "short", "timeseries",
     ("running", f"sum(sglang:num_running_reqs{{{BY_MODEL}}})"),
     ("slots saved now", f"sum({M}saved_slots_now{{{BY_MODEL}}})")),
    ("Prompt tokens a kept entry", "short", "timeseries",
     ("ratio of what is compressed", f"{rate('span_tokens')} / {rate('kept_slots')}")),
    ("Prompt tokens a second", "short", "timeseries",
     ("all", f"sum(rate(sglang:prompt_tokens_total{{{BY_MODEL}}}[$__rate_interval]))"),
     ("compressed", rate("span_tokens")), ("reused, compressed", rate("reused_tokens"))),
    ("Requests by why they stayed raw", "reqps", "timeseries", ("{{bypass}}", rate("requests", "bypass"))),
    ("Share of requests that start from a compressed prefix", "percentunit", "timeseries",
     ("hits", f"{rate('prefix_hits')} / {rate('requests')}")),
    ("Use of the pool", "percentunit", "timeseries", ("token usage", f"max(sglang:token_usage{{{BY_MODEL}}})")),
    ("Seconds of a stage, 95th percentile", "s", "timeseries",
     ("{{stage}}", "histogram_quantile(0.95, sum by (le, stage) "
      f"(rate({M}stage_seconds_bucket{{{BY_MODEL}}}[$__rate_interval])))")),
    ("Divergence of the next token, mean of the sampled requests", "nats", "timeseries",
     ("mean", f"sum(rate({M}fidelity_kl_sum{{{BY_MODEL}}}[$__rate_interval])) "
      f"/ sum(rate({M}fidelity_kl_count{{{BY_MODEL}}}[$__rate_interval]))")),
    ("Faults in the last hour", "short", "stat",
     ("{{stage}}", f"sum by (stage) (increase({M}faults_total{{{BY_MODEL}}}[1h]))")),
    ("Index of compressed prefixes", "short", "timeseries",
     ("prefixes", f"sum({M}index_prefixes{{{BY_MODEL}}})"), ("tokens", f"sum({M}index_tokens{{{BY_MODEL}}})")),
    ("Host pool: reused prompt tokens a second, and loads that were declined", "short", "timeseries",
     ("tokens loaded", rate("reused_host_tokens")), ("loads declined", rate("declined_load_backs"))),
    ("Servers by their compressor", "short", "stat",
     ("{{kind}}: {{method}}", f"sum by (kind, method) ({M}compressor_info{{{BY_MODEL}}})")),
)  # fmt: skip


def dashboard() -> dict:
    source = {"type": "prometheus", "uid": "${source}"}
    panels = []
    for number, (title, unit, kind, *targets) in enumerate(PANELS):
        panels.append(
            {
                "id": number + 1,
                "title": title,
                "type": kind,
                "datasource": source,
                "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + n), "datasource": source, "legendFormat": legend, "expr": expression}
                    for n, (legend, expression) in enumerate(targets)
                ],
            }
        )
    return {
        "uid": "sglang-metasoft",
        "title": "SGLang MetaSoft",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus"},
                {
                    "name": "model", "type": "query", "datasource": source, "multi": True, "includeAll": True,
                    "query": f"label_values({M}spans_total, model_name)", "refresh": 2,
                },
            ]
        },
        "panels": panels,
    }  # fmt: skip


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    print()
