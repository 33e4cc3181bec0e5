"""What finished runs learned and forgot: files of runs in, tables and pictures on one page out.

    runs.py -> methods.py -> tables.py, matched.py, pictures.py, slot_usage.py -> document.py

write.py puts the sections in order. Reads files alone: imports no torch, and of the package only
analysis (its report), storage and errors.
"""
