
tell guest kernel "$(uname -r)"
hypervisor=kvm
