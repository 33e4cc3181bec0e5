"""What finished runs learned and forgot, as tables and pictures: files in, one page out.

    runs.py -> methods.py -> estimates.py, frontier.py -> sections -> document.py -> write.py

Reads files alone and imports no torch.
"""
