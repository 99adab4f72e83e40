"""Quality of compressed prompts: benchmark tasks, runners that answer them, and reports.

``tasks/`` makes cases, ``client.py`` asks a running server, ``hf.py`` does the same in process for many methods at
once, ``report.py`` reads what both wrote. Needs the extra ``eval``.
"""
