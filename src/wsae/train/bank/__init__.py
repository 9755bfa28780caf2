"""Hundreds of small SAEs in one batched computation, each trained exactly as if alone."""

from wsae.train.bank.config import BankConfig
from wsae.train.bank.entry import Entry, make_entry
from wsae.train.bank.run import train_bank

__all__ = ["BankConfig", "Entry", "make_entry", "train_bank"]
