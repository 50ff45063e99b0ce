"""
Declare the structs and constants of Apple's headers that our calls of libSystem need.

Their names are those in the headers, so that a search finds them there. Each public upper-case integer *is* such a
constant. The ABI proof compiles all constants and offsets against the headers: mach/host_info.h, mach/machine.h,
mach/processor_info.h, mach/task_info.h, mach/thread_info.h, mach/message.h, mach/kern_return.h, mach/vm_statistics.h,
mach_debug/ipc_info.h, sys/mount.h, sys/param.h, sys/proc_info.h, sys/proc.h, sys/resource.h, sys/sysctl.h,
sys/syslimits.h. Names marked *private* are only in bsd/sys/proc_info_private.h of xnu-11417.

task_info.h packs to 4 bytes. All fields here have the offset of natural alignment; `task_vm_info` ends before the first
field that does not. `vm_statistics64` ends where macOS 15 does; a later revision adds fields at its end.
"""

from ctypes import Structure, c_char, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64

KERN_SUCCESS = 0
KERN_INVALID_ARGUMENT = 4
KERN_TERMINATED = 37
MACH_SEND_INVALID_DEST = 0x10000003
MACH_PORT_NULL = 0
MACH_PORT_DEAD = 0xFFFFFFFF
MACH_PORT_RIGHT_SEND = 0

TASK_ABSOLUTETIME_INFO = 1
TASK_EVENTS_INFO = 2
MACH_TASK_BASIC_INFO = 20
TASK_VM_INFO = 22

THREAD_IDENTIFIER_INFO = 4
THREAD_EXTENDED_INFO = 5
MAXTHREADNAMESIZE = 64
TH_STATE_RUNNING = 1
TH_STATE_STOPPED = 2
TH_STATE_WAITING = 3
TH_STATE_UNINTERRUPTIBLE = 4
TH_STATE_HALTED = 5

PROC_PIDLISTFDS = 1
PROC_PIDTASKALLINFO = 2
PROC_PIDVNODEPATHINFO = 9
PROC_PIDT_SHORTBSDINFO = 13
PROC_PIDTHREADID64INFO = 15
PROC_PIDUNIQIDENTIFIERINFO = 17
"""Private."""
PROC_PIDLISTTHREADIDS = 28
"""Private; since xnu-4903 (macOS 10.14)."""
PROC_FLAG_INEXIT = 4
SSTOP = 4
SZOMB = 5
RUSAGE_INFO_V2 = 2
RUSAGE_INFO_V4 = 4
RUSAGE_INFO_V6 = 6

HOST_VM_INFO64 = 4
PROCESSOR_CPU_LOAD_INFO = 2
CPU_STATE_USER = 0
CPU_STATE_SYSTEM = 1
CPU_STATE_IDLE = 2
CPU_STATE_NICE = 3
CPU_STATE_MAX = 4

CTL_KERN = 1
KERN_PROCARGS2 = 49
ARG_MAX = 1024 * 1024
MAXPATHLEN = 1024


class time_value(Structure):
    """A duration."""

    _fields_ = (("seconds", c_int32), ("microseconds", c_int32))


class mach_task_basic_info(Structure):
    """Memory and times of a task. Sizes are in bytes; the times are of *terminated* threads only."""

    _fields_ = (
        ("virtual_size", c_uint64),
        ("resident_size", c_uint64),
        ("resident_size_max", c_uint64),
        ("user_time", time_value),
        ("system_time", time_value),
        ("policy", c_int32),
        ("suspend_count", c_int32),
    )


class task_absolutetime_info(Structure):
    """CPU times of a task at one instant, in ticks: ``total_*`` of all threads, ``threads_*`` of the living ones."""

    _fields_ = (
        ("total_user", c_uint64),
        ("total_system", c_uint64),
        ("threads_user", c_uint64),
        ("threads_system", c_uint64),
    )


class task_events_info(Structure):
    """Counts of events since the start of a task; each stops at 2**31 - 1."""

    _fields_ = (
        ("faults", c_int32),
        ("pageins", c_int32),
        ("cow_faults", c_int32),
        ("messages_sent", c_int32),
        ("messages_received", c_int32),
        ("syscalls_mach", c_int32),
        ("syscalls_unix", c_int32),
        ("csw", c_int32),
    )


class task_vm_info(Structure):
    """Memory of a task, bytes. This is the first revision (TASK_VM_INFO_REV1_COUNT words); later ones are longer."""

    _fields_ = (
        ("virtual_size", c_uint64),
        ("region_count", c_int32),
        ("page_size", c_int32),
        ("resident_size", c_uint64),
        ("resident_size_peak", c_uint64),
        ("device", c_uint64),
        ("device_peak", c_uint64),
        ("internal", c_uint64),
        ("internal_peak", c_uint64),
        ("external", c_uint64),
        ("external_peak", c_uint64),
        ("reusable", c_uint64),
        ("reusable_peak", c_uint64),
        ("purgeable_volatile_pmap", c_uint64),
        ("purgeable_volatile_resident", c_uint64),
        ("purgeable_volatile_virtual", c_uint64),
        ("compressed", c_uint64),
        ("compressed_peak", c_uint64),
        ("compressed_lifetime", c_uint64),
        ("phys_footprint", c_uint64),
    )


class thread_identifier_info(Structure):
    """Ids of a thread; ``thread_id`` is unique since boot."""

    _fields_ = (("thread_id", c_uint64), ("thread_handle", c_uint64), ("dispatch_qaddr", c_uint64))


class thread_extended_info(Structure):
    """Figures of a thread; ``pth_user_time`` and ``pth_system_time`` are in ns, each rounded down to a microsecond."""

    _fields_ = (
        ("pth_user_time", c_uint64),
        ("pth_system_time", c_uint64),
        ("pth_cpu_usage", c_int32),
        ("pth_policy", c_int32),
        ("pth_run_state", c_int32),
        ("pth_flags", c_int32),
        ("pth_sleep_time", c_int32),
        ("pth_curpri", c_int32),
        ("pth_priority", c_int32),
        ("pth_maxpriority", c_int32),
        ("pth_name", c_char * MAXTHREADNAMESIZE),
    )


class proc_threadinfo(Structure):
    """The fields of `thread_extended_info`, as libproc returns them."""

    _fields_ = thread_extended_info._fields_


class ipc_info_space_basic(Structure):
    """Sizes of the port name space of a task; ``iisb_table_inuse`` is the number of names that it holds."""

    _fields_ = (
        ("iisb_genno_mask", c_uint32),
        ("iisb_table_size", c_uint32),
        ("iisb_table_next", c_uint32),
        ("iisb_table_inuse", c_uint32),
        ("iisb_reserved", c_uint32 * 2),
    )


class mach_timebase_info(Structure):
    """Factor from ticks of the clocks of user space to ns, as a fraction."""

    _fields_ = (("numer", c_uint32), ("denom", c_uint32))


class proc_bsdinfo(Structure):
    """Identity of a process; ``pbi_start_*`` is the wall clock at fork, never corrected and not changed by exec."""

    _fields_ = (
        ("pbi_flags", c_uint32),
        ("pbi_status", c_uint32),
        ("pbi_xstatus", c_uint32),
        ("pbi_pid", c_uint32),
        ("pbi_ppid", c_uint32),
        ("pbi_uid", c_uint32),
        ("pbi_gid", c_uint32),
        ("pbi_ruid", c_uint32),
        ("pbi_rgid", c_uint32),
        ("pbi_svuid", c_uint32),
        ("pbi_svgid", c_uint32),
        ("rfu_1", c_uint32),
        ("pbi_comm", c_char * 16),
        ("pbi_name", c_char * 32),
        ("pbi_nfiles", c_uint32),
        ("pbi_pgid", c_uint32),
        ("pbi_pjobc", c_uint32),
        ("e_tdev", c_uint32),
        ("e_tpgid", c_uint32),
        ("pbi_nice", c_int32),
        ("pbi_start_tvsec", c_uint64),
        ("pbi_start_tvusec", c_uint64),
    )


class proc_taskinfo(Structure):
    """Figures of a task: bytes and ticks; ``pti_total_*`` is of all threads, ``pti_threads_*`` of the living ones."""

    _fields_ = (
        ("pti_virtual_size", c_uint64),
        ("pti_resident_size", c_uint64),
        ("pti_total_user", c_uint64),
        ("pti_total_system", c_uint64),
        ("pti_threads_user", c_uint64),
        ("pti_threads_system", c_uint64),
        ("pti_policy", c_int32),
        ("pti_faults", c_int32),
        ("pti_pageins", c_int32),
        ("pti_cow_faults", c_int32),
        ("pti_messages_sent", c_int32),
        ("pti_messages_received", c_int32),
        ("pti_syscalls_mach", c_int32),
        ("pti_syscalls_unix", c_int32),
        ("pti_csw", c_int32),
        ("pti_threadnum", c_int32),
        ("pti_numrunning", c_int32),
        ("pti_priority", c_int32),
    )


class proc_taskallinfo(Structure):
    """Identity and figures of one process, in one reply, so that start time and CPU time belong together."""

    _fields_ = (("pbsd", proc_bsdinfo), ("ptinfo", proc_taskinfo))


class proc_bsdshortinfo(Structure):
    """Identity of a process of any user, also of a zombie."""

    _fields_ = (
        ("pbsi_pid", c_uint32),
        ("pbsi_ppid", c_uint32),
        ("pbsi_pgid", c_uint32),
        ("pbsi_status", c_uint32),
        ("pbsi_comm", c_char * 16),
        ("pbsi_flags", c_uint32),
        ("pbsi_uid", c_uint32),
        ("pbsi_gid", c_uint32),
        ("pbsi_ruid", c_uint32),
        ("pbsi_rgid", c_uint32),
        ("pbsi_svuid", c_uint32),
        ("pbsi_svgid", c_uint32),
        ("pbsi_rfu", c_uint32),
    )


class proc_uniqidentifierinfo(Structure):
    """Unique ids of a process. Private. ``p_idversion`` changes at fork and at exec."""

    _fields_ = (
        ("p_uuid", c_uint8 * 16),
        ("p_uniqueid", c_uint64),
        ("p_puniqueid", c_uint64),
        ("p_idversion", c_int32),
        ("p_orig_ppidversion", c_int32),
        ("p_reserve2", c_uint64),
        ("p_reserve3", c_uint64),
    )


class fsid(Structure):
    """Hold the number of a mounted file system."""

    _fields_ = (("val", c_int32 * 2),)


class vinfo_stat(Structure):
    """Hold what ``stat(2)`` reports: ``vst_size`` in bytes, ``vst_blocks`` in units of 512 bytes, times in s and ns."""

    _fields_ = (
        ("vst_dev", c_uint32),
        ("vst_mode", c_uint16),
        ("vst_nlink", c_uint16),
        ("vst_ino", c_uint64),
        ("vst_uid", c_uint32),
        ("vst_gid", c_uint32),
        ("vst_atime", c_int64),
        ("vst_atimensec", c_int64),
        ("vst_mtime", c_int64),
        ("vst_mtimensec", c_int64),
        ("vst_ctime", c_int64),
        ("vst_ctimensec", c_int64),
        ("vst_birthtime", c_int64),
        ("vst_birthtimensec", c_int64),
        ("vst_size", c_int64),
        ("vst_blocks", c_int64),
        ("vst_blksize", c_int32),
        ("vst_flags", c_uint32),
        ("vst_gen", c_uint32),
        ("vst_rdev", c_uint32),
        ("vst_qspare", c_int64 * 2),
    )


class vnode_info(Structure):
    """Hold the attributes of a file; ``vi_type`` is 2 for a directory."""

    _fields_ = (("vi_stat", vinfo_stat), ("vi_type", c_int32), ("vi_pad", c_int32), ("vi_fsid", fsid))


class vnode_info_path(Structure):
    """Hold attributes and path; ``vip_path`` ends with a NUL. A path that does not fit lacks its first names."""

    _fields_ = (("vip_vi", vnode_info), ("vip_path", c_char * MAXPATHLEN))


class proc_vnodepathinfo(Structure):
    """Hold the current directory, ``pvi_cdir``, and the root, ``pvi_rdir``: zeros unless ``chroot(2)`` changed it."""

    _fields_ = (("pvi_cdir", vnode_info_path), ("pvi_rdir", vnode_info_path))


class rusage_info_v2(Structure):
    """
    Resources that a process has used: every ``*_time`` and ``*_abstime`` in ticks, sizes in bytes.

    ``ri_child_*`` is of the children that it waited for, and of theirs.
    """

    _fields_ = (
        ("ri_uuid", c_uint8 * 16),
        ("ri_user_time", c_uint64),
        ("ri_system_time", c_uint64),
        ("ri_pkg_idle_wkups", c_uint64),
        ("ri_interrupt_wkups", c_uint64),
        ("ri_pageins", c_uint64),
        ("ri_wired_size", c_uint64),
        ("ri_resident_size", c_uint64),
        ("ri_phys_footprint", c_uint64),
        ("ri_proc_start_abstime", c_uint64),
        ("ri_proc_exit_abstime", c_uint64),
        ("ri_child_user_time", c_uint64),
        ("ri_child_system_time", c_uint64),
        ("ri_child_pkg_idle_wkups", c_uint64),
        ("ri_child_interrupt_wkups", c_uint64),
        ("ri_child_pageins", c_uint64),
        ("ri_child_elapsed_abstime", c_uint64),
        ("ri_diskio_bytesread", c_uint64),
        ("ri_diskio_byteswritten", c_uint64),
    )


class rusage_info_v4(Structure):
    """The fields of `rusage_info_v2`, and more; ``ri_runnable_time`` is 0 before xnu-6153 (macOS 10.15)."""

    _fields_ = (
        *rusage_info_v2._fields_,
        ("ri_cpu_time_qos_default", c_uint64),
        ("ri_cpu_time_qos_maintenance", c_uint64),
        ("ri_cpu_time_qos_background", c_uint64),
        ("ri_cpu_time_qos_utility", c_uint64),
        ("ri_cpu_time_qos_legacy", c_uint64),
        ("ri_cpu_time_qos_user_initiated", c_uint64),
        ("ri_cpu_time_qos_user_interactive", c_uint64),
        ("ri_billed_system_time", c_uint64),
        ("ri_serviced_system_time", c_uint64),
        ("ri_logical_writes", c_uint64),
        ("ri_lifetime_max_phys_footprint", c_uint64),
        ("ri_instructions", c_uint64),
        ("ri_cycles", c_uint64),
        ("ri_billed_energy", c_uint64),
        ("ri_serviced_energy", c_uint64),
        ("ri_interval_max_phys_footprint", c_uint64),
        ("ri_runnable_time", c_uint64),
    )


class rusage_info_v6(Structure):
    """The fields of `rusage_info_v4`, and time and energy on performance cores. Since xnu-8792 (macOS 13)."""

    _fields_ = (
        *rusage_info_v4._fields_,
        ("ri_flags", c_uint64),
        ("ri_user_ptime", c_uint64),
        ("ri_system_ptime", c_uint64),
        ("ri_pinstructions", c_uint64),
        ("ri_pcycles", c_uint64),
        ("ri_energy_nj", c_uint64),
        ("ri_penergy_nj", c_uint64),
        ("ri_secure_time_in_system", c_uint64),
        ("ri_secure_ptime_in_system", c_uint64),
        ("ri_neural_footprint", c_uint64),
        ("ri_lifetime_max_neural_footprint", c_uint64),
        ("ri_interval_max_neural_footprint", c_uint64),
        ("ri_conclave_footprint", c_uint64),
        ("ri_page_wait_time_mach", c_uint64),
        ("ri_page_cache_hits", c_uint64),
        ("ri_reserved", c_uint64 * 6),
    )


class proc_fdinfo(Structure):
    """An open descriptor and its type."""

    _fields_ = (("proc_fd", c_int32), ("proc_fdtype", c_uint32))


class processor_cpu_load_info(Structure):
    """Ticks of 1/100 s that a processor spent in each state since boot; each wraps at 2**32."""

    _fields_ = (("cpu_ticks", c_uint32 * CPU_STATE_MAX),)


class vm_statistics64(Structure):
    """
    Pages of the machine by use: the first revision (HOST_VM_INFO64_REV1_COUNT words).

    ``speculative_count`` is part of ``free_count``, and of ``external_page_count`` as well.
    """

    _fields_ = (
        ("free_count", c_uint32),
        ("active_count", c_uint32),
        ("inactive_count", c_uint32),
        ("wire_count", c_uint32),
        ("zero_fill_count", c_uint64),
        ("reactivations", c_uint64),
        ("pageins", c_uint64),
        ("pageouts", c_uint64),
        ("faults", c_uint64),
        ("cow_faults", c_uint64),
        ("lookups", c_uint64),
        ("hits", c_uint64),
        ("purges", c_uint64),
        ("purgeable_count", c_uint32),
        ("speculative_count", c_uint32),
        ("decompressions", c_uint64),
        ("compressions", c_uint64),
        ("swapins", c_uint64),
        ("swapouts", c_uint64),
        ("compressor_page_count", c_uint32),
        ("throttled_count", c_uint32),
        ("external_page_count", c_uint32),
        ("internal_page_count", c_uint32),
        ("total_uncompressed_pages_in_compressor", c_uint64),
    )


class xsw_usage(Structure):
    """Swap space, bytes; ``xsu_pagesize`` is the page of the kernel, also for a process that Rosetta translates."""

    _fields_ = (
        ("xsu_total", c_uint64),
        ("xsu_avail", c_uint64),
        ("xsu_used", c_uint64),
        ("xsu_pagesize", c_uint32),
        ("xsu_encrypted", c_int32),
    )


class loadavg(Structure):
    """Load averages of 1, 5 and 15 minutes, in units of 1/``fscale``."""

    _fields_ = (("ldavg", c_uint32 * 3), ("fscale", c_int64))
