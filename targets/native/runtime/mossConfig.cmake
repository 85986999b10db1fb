# SPDX-License-Identifier: Apache-2.0
#
# find_package(moss CONFIG PATHS "$(mossquant native-path)") gives the target moss::moss.

get_filename_component(_moss_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET moss::moss)
  add_library(moss::moss SHARED IMPORTED)
  set_target_properties(moss::moss PROPERTIES
    IMPORTED_LOCATION "${_moss_root}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}moss${CMAKE_SHARED_LIBRARY_SUFFIX}"
    INTERFACE_INCLUDE_DIRECTORIES "${_moss_root}/include")
endif()
