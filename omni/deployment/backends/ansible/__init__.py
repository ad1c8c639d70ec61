"""`backend: ansible`: hosts that are reached by ssh. Ansible runs `playbook/`; what differs is in an inventory."""
