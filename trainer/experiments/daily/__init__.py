"""`gensr daily FILE`: every new day of a log, from raw files to the registry.

plan.py    FILE, checked, and the days that wait
day.py     the steps of a day, each a verb
run.py     the story, and the champion that the days are begun with
report.py  OUT/daily.json, .txt, .png and .svg, and the commands of a dry run
"""
